"""Which form of HLA learns? Small models of many mixers on the same tasks, in one skeleton, one CSV row per run.

``python -m benchmarks.quality --help`` runs them, ``python -m benchmarks.quality.report`` draws and tabulates.
The findings are told in ``docs/evidence.md``.
"""
