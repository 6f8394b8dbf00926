"""The parts of prediction, one subject a file; :class:`~control_plane.prediction.LatencyPredictor` puts them together.

``priors`` what an engine most likely is, ``step_model`` how long its steps take, ``book`` what is in flight on it, ``arrivals`` how fast
things come, ``ratio`` what predictions have been off by lately, ``lengths`` how long answers get, ``hits`` how much of a prompt is cached,
``spending`` dollars by tenant and model, ``calibration`` how right all that was, ``sketch`` the distributions behind them.
"""
