"""The device's Flower ClientApp: it carries requests to ``client.node.step`` and the answers back. A refusal becomes an
error reply with its code and reason. Flower would send the text of an exception, which may name files of the device; a
step raises none."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from aggregation.steps import BODY, RECORD, Step
from client.node.statedir import DeviceStateDir
from client.node.step import Refusal, answer
from client.training.engine import TrainerOf, trainer_of

STATE = "state"  # key of the Flower node's configuration: the path of the state directory

OpenState = Callable[[Context], DeviceStateDir]
app = ClientApp()


def register(app: ClientApp, open_state: OpenState, choose: TrainerOf = trainer_of) -> None:
    """Let ``app``, a new one, answer the messages of every step. ``open_state``: Flower's context of a node → the state
    of the device there, opened for each message; ``choose`` chooses what makes the updates of these devices."""

    def handler(message: Message, context: Context) -> Message:
        step = Step(message.metadata.message_type.partition(".")[2])
        record = message.content.get(RECORD)
        items = record.items() if isinstance(record, ConfigRecord) else ()
        fields = {name: value for name, value in items if isinstance(value, bytes)}
        answered = answer(partial(open_state, context), step, fields, context.node_id, choose)
        if isinstance(answered, Refusal):
            return Message(Error(int(answered.code), answered.reason), reply_to=message)
        return Message(RecordDict({RECORD: ConfigRecord({BODY: answered})}), reply_to=message)

    for step in Step:
        kind = app.train if step is Step.PLAN else app.query
        kind(step.value)(handler)


register(app, lambda context: DeviceStateDir.open(Path(str(context.node_config.get(STATE, "")))))
