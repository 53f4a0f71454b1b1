"""``python -m benchmarks.ops --device cuda``: the operators beside softmax attention and flash-linear-attention.

`entries` says what is measured, `counts` what it must cost, `probes` and `benchmarks.measure` how it is measured,
`decode` and `cold_start` are the other two questions, `report` the table and the plot.
"""
