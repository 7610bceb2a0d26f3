#!/usr/bin/env bash
# jupyterlab 4.6.6, ipykernel 7.4.0, ipywidgets 8.1.9: callbacks of widgets run in two threads at once.
#
# By default (commsOverSubshells: perCommTarget) JupyterLab sends all messages of widgets to one subshell, a thread
# of the kernel's. But ipykernel hands a widget's message to the thread that the widget last spoke from, and each was
# made in the main one: its first message is handled there, its later ones in the subshell. So the callback of a
# slider that is dragged and that of a control used for the first time run at once, and a callback that passes over
# changes "while I am updating" loses the other one for good. The messages here are sent as JupyterLab sends them.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jupyterlab==4.6.6 ipykernel==7.4.0 ipywidgets==8.1.9 jupyter_client==8.10.0
cd "$folder"
export JUPYTER_DATA_DIR=$folder/data JUPYTER_RUNTIME_DIR=$folder/runtime IPYTHONDIR=$folder/ipython
cat >client.py <<'PYTHON'
import json, sys, time
from pathlib import Path
from jupyter_client.manager import start_new_kernel

schema = Path(sys.prefix, "share/jupyter/lab/schemas/@jupyterlab/apputils-extension/kernels-settings.json")
print("JupyterLab's default:", json.loads(schema.read_text())["properties"]["commsOverSubshells"]["default"])

CELL = """
from threading import Event, get_ident
from ipywidgets import IntSlider
first, second, both, threads, dropped = IntSlider(), IntSlider(), Event(), set(), []
updating = False
def update(change):
    global updating
    threads.add(get_ident())
    if updating:  # a common guard against changes that an update itself makes
        dropped.append(change.owner)
        both.set()
    elif change.new == 7:
        updating = True
        both.wait(20)
        updating = False
first.observe(update, "value"), second.observe(update, "value")
print(first.model_id, second.model_id)
"""
AFTER = "print(f'{len(threads)} threads, {len(dropped)} changes dropped')"

def told(kernel, code):
    said = []
    hook = lambda message: said.append(message["content"].get("text", ""))
    kernel.execute_interactive(code, output_hook=hook, timeout=120)
    return "".join(said).strip()

manager, kernel = start_new_kernel()
try:
    sliders = told(kernel, CELL).split()
    kernel.control_channel.send(kernel.session.msg("create_subshell_request", {}))
    subshell = kernel.get_control_msg(timeout=60)["content"]["subshell_id"]
    def move(slider, value):
        data = {"method": "update", "state": {"value": value}, "buffer_paths": []}
        message = kernel.session.msg("comm_msg", {"comm_id": slider, "data": data})
        message["header"]["subshell_id"] = subshell
        kernel.shell_channel.send(message)

    move(sliders[0], 1)
    print("one slider moved:", told(kernel, AFTER))
    move(sliders[0], 7)
    time.sleep(1)
    move(sliders[1], 7)
    print("two sliders moved:", told(kernel, AFTER))
finally:
    kernel.stop_channels()
    manager.shutdown_kernel(now=True)
PYTHON
"$folder/venv/bin/python" client.py 2>/dev/null | tee output
grep -q "JupyterLab's default: perCommTarget" output
grep -q "one slider moved: 1 threads, 0 changes dropped" output
grep -q "two sliders moved: 2 threads, 1 changes dropped" output
echo "as described"
