"""MLflow, from one place: what a run logs reaches the server in order, and training never waits for it."""

from training.tracking.secrets import masked
from training.tracking.tracker import OFF, Tracker, actual_run_id, is_sent, send, start_run, tracking_uri

__all__ = ["OFF", "Tracker", "actual_run_id", "is_sent", "masked", "send", "start_run", "tracking_uri"]
