"""The devices' app, with sessions that follow from the scenario's seed, so that two runs can be compared."""

from pathlib import Path

from flwr.clientapp import ClientApp

from benchmarks.simulation.flowerengine import open_state_dir
from client.node.app import STATE, register

app = ClientApp()
register(app, lambda context: open_state_dir(Path(str(context.node_config[STATE]))))
