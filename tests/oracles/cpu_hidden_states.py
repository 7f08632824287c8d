"""Loaded by a vLLM server that has no GPU: its own connector for hidden states, with the copy that CUDA would make.

vLLM's connector copies a request's states on a CUDA stream and writes them in a thread. The CPU build has no streams;
all else, the requests, the files, their names and locks, is vLLM's own.
"""

import os
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import (
    ExampleHiddenStatesConnector,
    extract_from_kv_cache,
)

COPIED = SimpleNamespace(query=lambda: True)  # stands for the event behind the copy


class CPUHiddenStates(ExampleHiddenStatesConnector):
    """Writes a request's states at once when it has ended."""

    def _submit_async_write(self, pending: Any) -> None:
        assert self._kv_cache is not None
        blocks = torch.tensor(pending.block_ids)[:, None] * self._block_size
        slots = (blocks + torch.arange(self._block_size)).flatten()
        states = extract_from_kv_cache(self._kv_cache, slots, len(pending.token_ids))
        save_file({"hidden_states": states.clone(), "token_ids": pending.token_ids.clone()}, pending.filename)
        if (lock := self._lock_fds.pop(pending.req_id, None)) is not None:
            os.close(lock)  # which lets readers in
        self._req_copy_events[pending.req_id] = COPIED  # pyright: ignore[reportArgumentType]
