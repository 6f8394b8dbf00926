"""The series that tell how right predictions have been lately: predicted against observed, by quantity."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from control_plane.predicting.calibration import Calibration

QUANTILES = (("0.5", 0.5), ("0.9", 0.9))


def prediction_series(calibration: Mapping[str, Calibration]) -> Iterator[Metric]:
    """Of each quantity (``ttft_ms``, ``tpot_ms``, ``output_tokens``, ``cost_usd``) that has been observed."""
    found = {name: one for name, one in calibration.items() if one.count}
    count = CounterMetricFamily("control_plane_prediction_samples", "Predictions that were compared.", labels=["quantity"])
    mean = GaugeMetricFamily("control_plane_prediction_mean_error_ratio", "Mean predicted over mean observed, less 1.", labels=["quantity"])
    covered = GaugeMetricFamily("control_plane_prediction_high_coverage_ratio", "Share at or below the predicted P90.", labels=["quantity"])
    for name, one in found.items():
        count.add_metric([name], one.count)
        mean.add_metric([name], one.mean_error)
        covered.add_metric([name], one.covered)
    value = GaugeMetricFamily("control_plane_prediction_value", "What was said and what came.", labels=["quantity", "source", "quantile"])
    error = GaugeMetricFamily("control_plane_prediction_error_ratio", "|predicted / observed - 1|.", labels=["quantity", "quantile"])
    loss = GaugeMetricFamily("control_plane_prediction_pinball_loss", "Mean, in the quantity's unit.", labels=["quantity", "quantile"])
    for name, one in found.items():
        for label, q in QUANTILES:
            value.add_metric([name, "predicted", label], one.predicted.quantile(q))
            value.add_metric([name, "observed", label], one.observed.quantile(q))
            error.add_metric([name, label], one.errors.quantile(q))
        loss.add_metric([name, "0.5"], one.pinball_p50)
        loss.add_metric([name, "0.9"], one.pinball_p90)
    yield from (count, mean, covered, value, error, loss)
