"""Measures a real server with a bounded load and writes what was found as a profile that the simulator runs."""

from control_plane.calibration.fitting import ServerTime
from control_plane.calibration.model_load import ModelLoad
from control_plane.calibration.run import Calibrated, Options, calibrate, run_calibrate
from control_plane.calibration.server import CannotCalibrate, Given
from control_plane.calibration.streams import HttpLoad, Load, Stream

__all__ = [
    "Calibrated",
    "CannotCalibrate",
    "Given",
    "HttpLoad",
    "Load",
    "ModelLoad",
    "Options",
    "ServerTime",
    "Stream",
    "calibrate",
    "run_calibrate",
]
