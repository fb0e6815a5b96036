def compose(
    gradient: int,
    weight: int,
    depthwise: int,
    result: int,
    by_depthwise: int,
    outputs: int,
    inputs: int,
    taps: int,
    groups: int,
    threads: int,
    /,
) -> None: ...
