"""Boards: other machines that run what is compiled here. `boards.yaml` names them, a transport reaches them, a device runs on them what we send."""
