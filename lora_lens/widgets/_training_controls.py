"""The controls of the live panel that other explorers do not have."""

from __future__ import annotations

from collections.abc import Callable

from ipywidgets import Button, Dropdown, IntSlider, Layout

from lora_lens.widgets._explorer import WORDS

RATES = (1e-3, 2e-3, 3e-3, 5e-3, 1e-2, 2e-2, 3e-2)


def learning_rate_choice(rate: float) -> Dropdown:
    options = [(f"{value:g}", value) for value in sorted({*RATES, rate})]
    return Dropdown(options=options, value=rate, description="learning rate", style=WORDS)


def steps_slider(steps: int) -> IntSlider:
    unit = 1 if steps % 10 else 10
    return IntSlider(steps, unit, max(4 * steps, 40), unit, description="steps")


def button(description: str, icon: str, tooltip: str, press: Callable[[], None]) -> Button:
    made = Button(description=description, icon=icon, tooltip=tooltip, layout=Layout(width="8em"))
    made.on_click(lambda _made: press())
    return made
