//! Pools that grow and shrink: the chart's numbers for it, and what came of a day under them.

pub(crate) mod fleet;
pub(crate) mod hpa;

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::report::Report;

/// How often Kubernetes looks (`--horizontal-pod-autoscaler-sync-period`), and Prometheus scrapes.
pub const SYNC: Duration = Duration::from_secs(15);

/// A pool that is to scale, and where its pods come from.
#[derive(Clone, Debug, PartialEq)]
pub struct Autoscale {
    pub values: Values,
    /// From the decision for a pod to its first request: a node, the image, the model.
    pub pod_start: Duration,
}

/// The chart's values that decide how many workers there are, named as in `helm/uniarm/values.yaml`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Values {
    pub drain_timeout_seconds: u32,
    pub autoscaling: Autoscaling,
}

/// `autoscaling` of the chart, without what only the chart needs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Autoscaling {
    pub prometheus: Rates,
    pub scale_up: ScaleUp,
    pub scale_down: ScaleDown,
    pub base: BasePool,
    pub reward: RewardPool,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Rates {
    /// Rates are taken over this time.
    pub rate_seconds: u32,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ScaleUp {
    pub stabilization_seconds: u32,
    /// A pool grows by so much of itself, or by so many pods, whichever is more, in each period.
    pub percent: u32,
    pub pods: u32,
    pub period_seconds: u32,
}

/// One pod at a time, in the time that it takes to leave.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ScaleDown {
    pub stabilization_seconds: u32,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BasePool {
    pub enabled: bool,
    pub min_replicas: u32,
    pub max_replicas: u32,
    /// Sequences, running or in line, over those that may run.
    pub sequences: Option<f64>,
    /// Cache blocks in use over all of them.
    pub blocks: Option<f64>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RewardPool {
    pub enabled: bool,
    pub min_replicas: u32,
    pub max_replicas: u32,
    /// Sessions over those that may run.
    pub sessions: Option<f64>,
    /// Cache blocks in use over all of them.
    pub blocks: Option<f64>,
    /// Time that tokens wait for their reward over the time that answers take, as far as more workers would shorten it.
    pub stall: Option<f64>,
}

#[derive(Debug, thiserror::Error)]
pub enum ValuesError {
    #[error("these are not the chart's values: {0}")]
    Json(#[from] serde_json::Error),
    #[error("{field} is {value}, but {limit}")]
    Invalid { field: &'static str, value: String, limit: &'static str },
}

/// A trace through pools that scaled.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Day {
    /// Workers are the most that there were at once; busy is the share of the time that pods were there.
    pub report: Report,
    pub base: FleetReport,
    pub reward: FleetReport,
    /// One for each look of the autoscaler.
    pub samples: Vec<Sample>,
}

/// How a pool's size went.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct FleetReport {
    pub least: usize,
    pub most: usize,
    /// Seconds of all pods together, from the decision for each to its end.
    pub pod_seconds: f64,
    /// How often the size changed, and how often a change was of another direction than the one before.
    pub changes: usize,
    pub turns: usize,
    /// Streams, or sessions, that went on elsewhere because their pod left.
    pub moved: usize,
}

/// A moment of a day.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Sample {
    pub at: f64,
    /// Since the sample before, like the latencies.
    pub requests_per_second: f64,
    pub first_token_p99: f64,
    pub inter_token_p99: f64,
    pub base: PoolSample,
    pub reward: PoolSample,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct PoolSample {
    /// Pods that are wanted, and those of them that serve.
    pub replicas: usize,
    pub ready: usize,
    /// What the autoscaler was told: sequences or sessions and blocks in pods' worth, the stall as a share.
    pub places: f64,
    pub blocks: f64,
    pub stall: f64,
}

// === impl Values ===

impl Values {
    /// The chart's defaults. `tests/helm` holds them against `helm/uniarm/values.yaml`.
    pub fn chart() -> Self {
        Self {
            drain_timeout_seconds: 60,
            autoscaling: Autoscaling {
                prometheus: Rates { rate_seconds: 120 },
                scale_up: ScaleUp { stabilization_seconds: 30, percent: 50, pods: 2, period_seconds: 60 },
                scale_down: ScaleDown { stabilization_seconds: 300 },
                base: BasePool {
                    enabled: true,
                    min_replicas: 2,
                    max_replicas: 10,
                    sequences: Some(0.6),
                    blocks: Some(0.7),
                },
                reward: RewardPool {
                    enabled: true,
                    min_replicas: 2,
                    max_replicas: 10,
                    sessions: Some(0.6),
                    blocks: Some(0.7),
                    stall: Some(0.3),
                },
            },
        }
    }

    /// Reads the values of a release, as `helm get values --all --output json` writes them.
    ///
    /// # Errors
    /// When they are not the chart's, or the chart would refuse them.
    pub fn read(text: &str) -> Result<Self, ValuesError> {
        let values: Self = serde_json::from_str(text)?;
        values.check()?;
        Ok(values)
    }

    fn check(&self) -> Result<(), ValuesError> {
        let invalid = |field, value: String, limit| Err(ValuesError::Invalid { field, value, limit });
        let Autoscaling { base, reward, .. } = &self.autoscaling;
        for (field, enabled) in
            [("autoscaling.base.enabled", base.enabled), ("autoscaling.reward.enabled", reward.enabled)]
        {
            if !enabled {
                let limit = "both pools scale here: for one that does not, set minReplicas and maxReplicas to its size";
                return invalid(field, enabled.to_string(), limit);
            }
        }
        for (field, least, most) in [
            ("autoscaling.base.minReplicas", base.min_replicas, base.max_replicas),
            ("autoscaling.reward.minReplicas", reward.min_replicas, reward.max_replicas),
        ] {
            if least == 0 || least > most {
                return invalid(field, least.to_string(), "wants to be at least 1 and at most maxReplicas");
            }
        }
        for (field, target) in [
            ("autoscaling.base.sequences", base.sequences),
            ("autoscaling.base.blocks", base.blocks),
            ("autoscaling.reward.sessions", reward.sessions),
            ("autoscaling.reward.blocks", reward.blocks),
            ("autoscaling.reward.stall", reward.stall),
        ] {
            if let Some(target) = target.filter(|target| !(target.is_finite() && *target > 0.0)) {
                return invalid(field, target.to_string(), "wants to be above 0, or null");
            }
        }
        Ok(())
    }

    /// What a pod has from the word to stop until it is killed: `terminationGracePeriodSeconds` of the chart.
    pub fn grace(&self) -> Duration {
        self.drain() + Duration::from_secs(10)
    }

    /// What it has to finish what it streams.
    pub fn drain(&self) -> Duration {
        Duration::from_secs(self.drain_timeout_seconds.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_read_as_helm_writes_them_and_refused_by_the_name_that_they_have_there() {
        let mut json = serde_json::to_value(Values::chart()).unwrap();
        json["image"] = "what else the chart has".into();
        json["autoscaling"]["by"] = "keda".into();
        assert_eq!(Values::read(&json.to_string()).unwrap(), Values::chart());
        json["autoscaling"]["reward"]["stall"] = serde_json::Value::Null;
        assert_eq!(Values::read(&json.to_string()).unwrap().autoscaling.reward.stall, None);
        json["autoscaling"]["base"]["minReplicas"] = 11.into();
        let error = Values::read(&json.to_string()).unwrap_err().to_string();
        assert!(error.starts_with("autoscaling.base.minReplicas is 11, but"), "{error}");
        json["autoscaling"]["base"]["minReplicas"] = 1.into();
        json["autoscaling"]["reward"]["enabled"] = false.into();
        let error = Values::read(&json.to_string()).unwrap_err().to_string();
        assert!(error.starts_with("autoscaling.reward.enabled is false, but both pools"), "{error}");
        json["autoscaling"]["reward"]["enabled"] = true.into();
        json["autoscaling"]["reward"]["sessions"] = 0.into();
        let error = Values::read(&json.to_string()).unwrap_err().to_string();
        assert!(error.starts_with("autoscaling.reward.sessions is 0, but"), "{error}");
    }
}
