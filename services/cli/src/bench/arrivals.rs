//! Who asks when, and for what: an open-loop arrival process that a seed fixes.
//!
//! Open loop: a request comes when its time has come, however slow the cluster is. A closed loop of clients that wait for
//! their answers slows down with the cluster and hides its queues.

use std::{ops::RangeInclusive, time::Duration};

use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

/// Tokens of synthetic prompts: ordinary ones of every vocabulary that is served.
const TOKENS: RangeInclusive<u32> = 100..=5000;

/// What a load is drawn from.
#[derive(Debug, Clone)]
pub struct Traffic {
    /// Requests per second.
    pub rate: f64,
    pub duration: Duration,
    pub prompt_tokens: RangeInclusive<u32>,
    pub answer_tokens: RangeInclusive<u32>,
    /// Share of requests that are guided.
    pub guided: f64,
}

/// One request.
#[derive(Debug, Clone, PartialEq)]
pub struct Arrival {
    /// From the start of the load.
    pub at: Duration,
    pub prompt: Vec<u32>,
    pub answer_tokens: u32,
    pub seed: u64,
    /// How it is steered: which of the reward models, and the weight of the first objective. `None`: not at all.
    pub guidance: Option<(u32, f32)>,
}

// === impl Arrival ===

impl Arrival {
    /// The same for `uniarm simulate`, where one of so many reward models is served for each preference.
    pub fn as_trace(&self, rewards: usize) -> uniarm_simulate::Arrival {
        let reward = self.guidance.map(|(which, _)| which as usize % rewards.max(1));
        uniarm_simulate::Arrival {
            at: self.at.as_secs_f64(),
            prompt_tokens: self.prompt.len(),
            answer_tokens: self.answer_tokens as usize,
            guided: self.guidance.is_some(),
            preference: reward.map_or_else(String::new, |reward| format!("reward-{reward}")),
            priority: uniarm_simulate::trace::ArrivalPriority::Normal,
            prefix: String::new(),
            prefix_tokens: 0,
            timeout: None,
        }
    }
}

// === impl Traffic ===

impl Traffic {
    /// A Poisson process: exponential times between arrivals. Prompts are their own: nobody profits from another one's
    /// cache.
    pub fn arrivals(&self, seed: u64) -> Vec<Arrival> {
        let mut random = StdRng::seed_from_u64(seed);
        let mut arrivals = Vec::new();
        let mut seconds = 0.0;
        loop {
            // In (0, 1]: the logarithm is finite.
            let uniform = 1.0 - random.random::<f64>();
            seconds -= uniform.ln() / self.rate;
            if seconds >= self.duration.as_secs_f64() {
                return arrivals;
            }
            let length = random.random_range(self.prompt_tokens.clone());
            let guidance = (random.random(), random.random());
            arrivals.push(Arrival {
                at: Duration::from_secs_f64(seconds),
                prompt: (0..length).map(|_| random.random_range(TOKENS)).collect(),
                answer_tokens: random.random_range(self.answer_tokens.clone()),
                seed: random.random(),
                guidance: (random.random::<f64>() < self.guided).then_some(guidance),
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn traffic() -> Traffic {
        Traffic {
            rate: 50.0,
            duration: Duration::from_secs(100),
            prompt_tokens: 8..=16,
            answer_tokens: 4..=4,
            guided: 0.25,
        }
    }

    #[test]
    fn a_seed_fixes_every_arrival() {
        assert_eq!(traffic().arrivals(7), traffic().arrivals(7));
        assert_ne!(traffic().arrivals(7), traffic().arrivals(8));
    }

    #[test]
    fn arrivals_come_at_their_rate_and_as_they_were_asked_for() {
        let arrivals = traffic().arrivals(7);
        // Standard deviation √5000 ≈ 71.
        assert!((4700..5300).contains(&arrivals.len()), "{}", arrivals.len());
        assert!(arrivals.is_sorted_by_key(|arrival| arrival.at));
        assert!(arrivals.iter().all(|a| (8..=16).contains(&a.prompt.len()) && a.answer_tokens == 4));
        let guided = arrivals.iter().filter(|arrival| arrival.guidance.is_some()).count();
        assert!((1100..1400).contains(&guided), "{guided}");
        // The times between arrivals of a Poisson process vary as much as they are long.
        let gaps: Vec<f64> =
            arrivals.windows(2).map(|pair| (pair[1].at - pair[0].at).as_secs_f64()).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let deviation = (gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / gaps.len() as f64).sqrt();
        assert!((deviation / mean - 1.0).abs() < 0.1, "{deviation} {mean}");
    }
}
