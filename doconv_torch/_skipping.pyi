from collections.abc import Sequence

def skip(
    addresses: tuple[int, ...],
    epsilon: float,
    shape: Sequence[int],
    heads: tuple[int, int, int, int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    threads: int,
    /,
) -> None: ...
