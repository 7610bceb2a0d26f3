#!/usr/bin/env bash
# jupyter_server 2.21.1: small messages from a kernel that come fast wait 40 ms in the server, on Linux.
#
# A kernel answers with several small messages: busy, the answer, idle. The server's websocket to the browser
# leaves Nagle's algorithm on, so the second waits until the first is acknowledged, which the other end's system
# puts off for about 40 ms, as it hopes to send it with data. A widget that follows a slider is late by that.
# Tornado offers set_nodelay(True) for the websocket; the same server with that one call has no such pause.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jupyter_server==2.21.1 ipykernel==7.4.0 tornado==6.6.1 websocket-client==1.9.2
cd "$folder"
export JUPYTER_CONFIG_DIR=$folder/config JUPYTER_DATA_DIR=$folder/data JUPYTER_RUNTIME_DIR=$folder/runtime
cat >prompt.py <<'PYTHON'
from jupyter_server.services.kernels.connection.channels import ZMQChannelsWebsocketConnection

class Prompt(ZMQChannelsWebsocketConnection):
    def connect(self):
        self.websocket_handler.set_nodelay(True)
        return super().connect()
PYTHON
cat >client.py <<'PYTHON'
import json, os, statistics, subprocess, sys, time, urllib.request, uuid
import websocket

def pause(port, *options):
    """Milliseconds from the first to the last message with which a kernel answers: the median of 30."""
    options = [f"--ServerApp.port={port}", "--IdentityProvider.token=t", "--ServerApp.port_retries=0", *options]
    command = [sys.executable, "-m", "jupyter_server", "--no-browser", "--allow-root", *options]
    server = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": "."}, stderr=subprocess.DEVNULL)
    try:
        address = f"127.0.0.1:{port}/api/kernels"
        for _ in range(300):
            try:
                made = urllib.request.Request(f"http://{address}?token=t", b"{}")
                kernel = json.load(urllib.request.urlopen(made))["id"]
                break
            except OSError:
                time.sleep(0.2)
        line = websocket.create_connection(f"ws://{address}/{kernel}/channels?token=t", timeout=60)
        times = []
        for _ in range(30):
            asked = uuid.uuid4().hex
            header = {"msg_id": asked, "msg_type": "execute_request", "session": "s", "username": "", "version": "5.3"}
            content = {"code": "1", "silent": False, "store_history": False}
            rest = {"parent_header": {}, "metadata": {}, "channel": "shell", "buffers": []}
            time.sleep(0.02)  # the pace of a slider that is dragged
            line.send(json.dumps({"header": header, "content": content, **rest}))
            first = None
            while True:
                told = json.loads(line.recv())
                if told["parent_header"].get("msg_id") != asked:
                    continue
                first = first or time.perf_counter()
                if told["content"].get("execution_state") == "idle":
                    break
            times.append(1000 * (time.perf_counter() - first))
        return statistics.median(times)
    finally:
        server.terminate()
        server.wait()

as_it_is = pause(18888)
at_once = pause(18889, "--ServerApp.kernel_websocket_connection_class=prompt.Prompt")
print(f"first to last message of an answer: {as_it_is:.0f} ms, with TCP_NODELAY {at_once:.0f} ms")
print("as it is, it waits for an acknowledgement:", as_it_is > 35 and as_it_is - at_once > 25)
PYTHON
"$folder/venv/bin/python" client.py | tee output
grep -q "waits for an acknowledgement: True" output
echo "as described"
