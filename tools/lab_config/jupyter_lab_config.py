"""The course's defaults for JupyterLab; what a user's own configuration says comes after them, and arguments win."""

c = get_config()  # type: ignore[name-defined]  # noqa: F821
c.ServerApp.ip = "127.0.0.1"
c.ServerApp.port = 8888
c.Application.log_level = "WARN"  # of the server's log, the address and what is wrong
