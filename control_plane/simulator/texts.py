from control_plane.simulator.workload import TraceRequest


def prompt_head(trace: TraceRequest, limit_bytes: int, block_tokens: int) -> bytes:
    return b"".join(b"%016x" % b * 128 for b in trace.block_ids[: -(-limit_bytes // 2048)])[:limit_bytes]
