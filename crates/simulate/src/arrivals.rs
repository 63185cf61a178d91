//! Made-up traffic: a rate over time, thinned into arrivals, with lengths and preferences.

use std::f64::consts::TAU;

use crate::dice::{Dice, Purpose};
use crate::trace::{Arrival, ArrivalPriority};

/// How the rate changes. Its mean is the same in every pattern.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Pattern {
    /// Constant: arrivals without memory.
    Poisson,
    /// For one tenth of every period the rate is `factor` times that of the rest.
    Bursts { period_seconds: f64, factor: f64 },
    /// A sine over `day_seconds`, from trough to peak; the peak's rate is `factor` times the trough's.
    Day { day_seconds: f64, factor: f64 },
}

/// A length that scatters: log-normal around its mean, or always the mean where `spread` is 0.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Length {
    pub mean: f64,
    /// Standard deviation of the logarithm; conversations have about 1.
    pub spread: f64,
    pub max: usize,
}

/// Traffic to make.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Traffic {
    pub pattern: Pattern,
    /// Mean arrivals per second.
    pub rate: f64,
    pub requests: usize,
    pub prompt: Length,
    pub answer: Length,
    /// Tokens that all prompts begin with: a system text.
    pub shared_tokens: usize,
    pub guided_share: f64,
    /// Different preferences, asked for equally often.
    pub preferences: u32,
}

/// The part of a period that is a burst.
const BURST_SHARE: f64 = 0.1;

// === impl Pattern ===

impl Pattern {
    /// The rate at a time, over its mean.
    fn at(self, seconds: f64) -> f64 {
        match self {
            Self::Poisson => 1.0,
            Self::Bursts { period_seconds, factor } => {
                let quiet = 1.0 / (1.0 - BURST_SHARE + BURST_SHARE * factor);
                match (seconds / period_seconds).fract() < BURST_SHARE {
                    true => quiet * factor,
                    false => quiet,
                }
            }
            Self::Day { day_seconds, factor } => {
                let swing = (factor - 1.0) / (factor + 1.0);
                1.0 - swing * (TAU * seconds / day_seconds).cos()
            }
        }
    }

    fn most(self) -> f64 {
        match self {
            Self::Poisson => 1.0,
            Self::Bursts { factor, .. } => factor / (1.0 - BURST_SHARE + BURST_SHARE * factor),
            Self::Day { factor, .. } => 2.0 * factor / (factor + 1.0),
        }
    }
}

// === impl Length ===

impl Length {
    pub fn fixed(tokens: usize) -> Self {
        Self { mean: tokens as f64, spread: 0.0, max: tokens }
    }

    fn draw(self, normal: f64) -> usize {
        let median = self.mean * (-0.5 * self.spread * self.spread).exp();
        ((median * (self.spread * normal).exp()).round() as usize).clamp(1, self.max)
    }
}

// === impl Traffic ===

impl Traffic {
    /// The arrivals, a function of the traffic and the seed. A higher rate shortens the times between the same
    /// requests.
    pub fn arrivals(&self, seed: u64) -> Vec<Arrival> {
        let dice = Dice::new(seed);
        let mut arrivals = Vec::with_capacity(self.requests);
        let (mut seconds, mut tried) = (0.0, 0);
        while arrivals.len() < self.requests {
            let [gap, kept, ..] = dice.units(Purpose::ArrivalTime, tried, 0);
            tried += 1;
            seconds -= gap.ln() / (self.rate * self.pattern.most());
            if kept * self.pattern.most() < self.pattern.at(seconds) {
                arrivals.push(self.arrival(dice, arrivals.len() as u64, seconds));
            }
        }
        arrivals
    }

    fn arrival(&self, dice: Dice, index: u64, at: f64) -> Arrival {
        let [a, b, ..] = dice.units(Purpose::Lengths, index, 0);
        // Box and Muller: two independent normal numbers.
        let radius = (-2.0 * a.ln()).sqrt();
        let [guided, preference, ..] = dice.units(Purpose::ArrivalKind, index, 0);
        let own_tokens = self.prompt.draw(radius * (TAU * b).cos());
        let preference = (preference * f64::from(self.preferences)) as u32;
        Arrival {
            at,
            prompt_tokens: self.shared_tokens + own_tokens,
            answer_tokens: self.answer.draw(radius * (TAU * b).sin()),
            guided: guided < self.guided_share,
            preference: format!("preference-{preference}"),
            priority: ArrivalPriority::Normal,
            prefix: String::new(),
            prefix_tokens: self.shared_tokens,
            timeout: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRAFFIC: Traffic = Traffic {
        pattern: Pattern::Poisson,
        rate: 50.0,
        requests: 20_000,
        prompt: Length { mean: 120.0, spread: 1.0, max: 4096 },
        answer: Length { mean: 60.0, spread: 0.5, max: 4096 },
        shared_tokens: 0,
        guided_share: 0.75,
        preferences: 4,
    };

    #[test]
    fn every_pattern_keeps_the_mean_rate_and_the_mean_lengths() {
        let bursts = Pattern::Bursts { period_seconds: 10.0, factor: 8.0 };
        let day = Pattern::Day { day_seconds: 100.0, factor: 5.0 };
        for pattern in [Pattern::Poisson, bursts, day] {
            let traffic = Traffic { pattern, ..TRAFFIC };
            let arrivals = traffic.arrivals(7);
            assert_eq!(arrivals, traffic.arrivals(7));
            assert!(arrivals.is_sorted_by(|a, b| a.at <= b.at));
            let count = arrivals.len() as f64;
            let rate = count / arrivals[arrivals.len() - 1].at;
            assert!((rate / 50.0 - 1.0).abs() < 0.03, "{pattern:?}: {rate} per second");
            let prompt = arrivals.iter().map(|a| a.prompt_tokens).sum::<usize>() as f64 / count;
            let answer = arrivals.iter().map(|a| a.answer_tokens).sum::<usize>() as f64 / count;
            assert!((prompt / 120.0 - 1.0).abs() < 0.05 && (answer / 60.0 - 1.0).abs() < 0.05);
            let guided = arrivals.iter().filter(|a| a.guided).count() as f64 / count;
            assert!((guided - 0.75).abs() < 0.02);
        }
    }

    #[test]
    fn a_burst_is_as_much_denser_as_it_says() {
        let pattern = Pattern::Bursts { period_seconds: 10.0, factor: 8.0 };
        let arrivals = Traffic { pattern, ..TRAFFIC }.arrivals(1);
        let inside = arrivals.iter().filter(|a| (a.at / 10.0).fract() < BURST_SHARE).count() as f64;
        let outside = arrivals.len() as f64 - inside;
        let ratio = (inside / BURST_SHARE) / (outside / (1.0 - BURST_SHARE));
        assert!((ratio / 8.0 - 1.0).abs() < 0.1, "{ratio}");
    }
}
