"""A kernel that is gone: the explorers say so, and live again when their cell is run again."""

from __future__ import annotations

import os
import signal
from typing import ClassVar

from pages import Explorer, Notebook

EXPLORERS = """import os
import lora_lens as ll

model, _ = ll.tasks.bundled.vision()
print(os.getpid())
ll.widgets.spectrum_explorer(ll.spectra(model, vectors=False, progress=False))"""


class TestRestart:
    name = "restart"
    cells: ClassVar = (EXPLORERS,)

    def test_a_restart_is_said_until_the_cell_is_run_again(self, notebook: Notebook, explorer: Explorer):
        said = explorer.root.locator(".ll-no-kernel")
        assert explorer.view().pictures and not said.is_visible()
        notebook.restart()
        said.wait_for()
        assert "Run the cell again" in said.inner_text()
        assert explorer.view().pictures  # the last view stays to be looked at

        notebook.run()
        said.wait_for(state="hidden")
        explorer.changed(lambda: explorer.press("position", "End"), lambda view: "position 1 " in view.alt)

    def test_a_kernel_that_dies_is_said(self, notebook: Notebook, explorer: Explorer):
        said = explorer.root.locator(".ll-no-kernel")
        said.wait_for(state="hidden")
        os.kill(notebook.kernel_process(), signal.SIGKILL)
        said.wait_for()
        notebook.wait_for_kernel()  # the server starts another one, and cannot end it before it is there
