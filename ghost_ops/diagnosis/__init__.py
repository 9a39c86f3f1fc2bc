"""The report ``python -m ghost_ops``.

``collect``   the facts as data for JSON
``selftest``  short checks of every backend against the float64 reference
``text``      the data as lines of at most 100 columns
``command``   the command line

Only ``selftest`` imports torch or the rest of ghost_ops at its top: the report has to say why they
do not import.
"""
