"""A server that passes on at once what a kernel says, for ``make lab`` and, by voila.py, ``make app``.

As it comes, jupyter_server 2.21 leaves Nagle's algorithm on: of the small messages that answer a dragged
slider, the second waits for the first one's acknowledgement, 40 ms on Linux (findings/).
"""

from jupyter_server.services.kernels.connection.channels import ZMQChannelsWebsocketConnection


class PromptConnection(ZMQChannelsWebsocketConnection):
    def connect(self):
        self.websocket_handler.set_nodelay(True)
        return super().connect()


c = get_config()  # noqa: F821 - given by traitlets
c.ServerApp.kernel_websocket_connection_class = PromptConnection
c.Voila.kernel_websocket_connection_class = PromptConnection
