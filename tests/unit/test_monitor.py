"""The monitor of a rank asks the helper thread, perhaps twice before it answers once."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path
from typing import Any

from dtrain.watching.monitor import Monitor
from dtrain.watching.verdict import Rules
from dtrain.watching.witness import Answer, Ward


def test_two_questions_that_cross_get_an_answer_each() -> None:
    async def life() -> list[Any]:
        ours, theirs = socket.socketpair()
        monitor = Monitor(Ward(0, 0, 0, 0, None, None, theirs, Rules(10.0), Path()))
        reader, monitor._to_rank = await asyncio.open_connection(sock=theirs)
        listening = asyncio.create_task(monitor._listen(reader))
        asking = asyncio.gather(monitor._ask(), monitor._ask(hush=True))
        await asyncio.sleep(0)
        ours.sendall("".join(json.dumps({"answer": [[{"number": n}], False]}) + "\n" for n in (1, 2)).encode())
        answers = await asking
        listening.cancel()
        monitor._to_rank.close()
        ours.close()
        return list(answers)

    assert asyncio.run(life()) == [Answer([{"number": n}], False) for n in (1, 2)]
