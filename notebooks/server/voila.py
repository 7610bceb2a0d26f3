"""What the server of ``make app`` is told, besides its command line."""

load_subconfig("jupyter_server_config.py")  # noqa: F821 - given by traitlets
