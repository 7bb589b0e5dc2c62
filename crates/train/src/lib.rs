//! Training: the loop, the optimizer, checkpoints, held-out loss per domain, and where the numbers
//! of a run go.

#![forbid(unsafe_code)]

pub mod checkpoint;
mod config;
mod energy;
mod error;
mod evaluate;
mod event;
mod fit;
mod heads;
mod movement;
mod optimizer;
pub mod ranks;
pub mod report;
mod routing;
mod schedule;
mod sinks;
mod timing;

pub use config::TrainConfig;
pub use error::{Error, Result};
pub use evaluate::{DomainLoss, Evaluation, SetLoss, evaluate, evaluate_until};
pub use event::{Event, Sink, StepMetrics, peak_rss_mb, reset_peak_rss};
pub use fit::{
    ClusterOf, Ending, Outcome, RankMetrics, Run, check_ranks, finished, fit, planned_steps,
};
pub use heads::{COPIES, HeadSummary, LOOKED_AT_AFTER, RouterMetrics};
pub use movement::{ROUTER_START_FILE, router_movement};
pub use optimizer::{
    Chosen, Kind, OPTIMIZER, OPTIMIZERS, Optimizer, Rates, StateTensor, Step, Stepper, Trained,
};
pub use routing::{Routing, RoutingLog, SiteRouting};
pub use schedule::{Curve, Schedule};
pub use sinks::{
    COLUMNS, Columns, METRICS_FILE, METRICS_TABLE, MetricsFile, TensorBoard, read_metrics,
};
pub use timing::{Timing, time_tokens};
