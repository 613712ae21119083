"""What is ours beside the folders of the device, the coordinator, the exporter and the protocol core.

``formats`` has every file and message that two parts share, ``bases`` the frozen models, ``methods`` their adapters,
``rounds`` what a round is about. ``audit``, ``authority`` and ``releases`` are the tools of the auditor, of who
enrols devices and of who releases to them. ``program`` is the command line. Nothing is imported here: some modules
need torch, and others run on the bare install.
"""
