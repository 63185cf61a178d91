//! The loss of one pair under one preference [method §3], and its slope.
//!
//! With D = log π(a) − log π(b), sums over response tokens, and s_i = ±1 the label of objective i:
//!
//! ```text
//! ℓ_i      = −log σ(s_i · β_i · D)                                     [paper, code]
//! L_global = −log σ(sign(M) · β_g · D),   M = Σ p_i m_i                [ours; m_i is the margin of objective i]
//! L        = Σ p_i ℓ_i + λ L_global                                    linear
//! L        = μ log Σ exp(p_i ℓ_i / μ) − μ log k + λ L_global           smooth Tchebycheff
//! ```
//!
//! D can grow by making b improbable, and a model does that to all words alike: what it writes instead is nobody's
//! preference. With α > 0 the answers that are preferred stay probable [ours, as RPO and CPO do; off by default]:
//!
//! ```text
//! L       += −α Σ p_i · mean over tokens of log π(the answer that objective i prefers)
//! ```
//!
//! Everything is a function of the two sums of log-probabilities, so two numbers per pair, the slopes along them, are
//! all that the network needs to know.

/// How the losses of the objectives become one.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Scalarisation {
    Linear,
    /// A smooth maximum of p_i ℓ_i; μ → 0 is the maximum itself.
    Tchebycheff {
        mu: f64,
    },
}

/// Constants of the loss.
#[derive(Clone, Debug, PartialEq)]
pub struct Loss {
    pub scalarisation: Scalarisation,
    /// β_i, one for each objective.
    pub betas: Vec<f64>,
    /// β_g
    pub global_beta: f64,
    /// λ
    pub global_weight: f64,
    /// α
    pub likelihood_weight: f64,
}

/// What the network says of an answer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Likelihood {
    /// log π, a sum over tokens.
    pub sum: f64,
    pub tokens: usize,
}

/// Which answer each objective prefers, and by how much.
#[derive(Clone, Debug, PartialEq)]
pub struct Labels {
    /// s_i: +1 where objective i prefers a, −1 where it prefers b.
    pub signs: Vec<f64>,
    /// m_i: standardised score margin of a over b, or s_i where there are no scores.
    pub margins: Vec<f64>,
}

/// The loss of one pair.
#[derive(Clone, Debug, PartialEq)]
pub struct LossValue {
    pub total: f64,
    /// ℓ_i
    pub objectives: Vec<f64>,
    pub global: f64,
    /// dL/d log π of a and of b.
    pub slopes: [f64; 2],
}

// === impl Loss ===

impl Loss {
    /// `answers` are a and b.
    pub fn of(&self, preference: &[f32], labels: &Labels, answers: [Likelihood; 2]) -> LossValue {
        let difference = answers[0].sum - answers[1].sum;
        let preference: Vec<f64> = preference.iter().map(|weight| f64::from(*weight)).collect();
        let terms =
            labels.signs.iter().zip(&self.betas).map(|(sign, beta)| logistic(sign * beta, difference));
        let (objectives, slopes): (Vec<f64>, Vec<f64>) = terms.unzip();
        let weighted = preference.iter().zip(&objectives).map(|(weight, loss)| weight * loss);
        let (mixed, shares) = match self.scalarisation {
            Scalarisation::Linear => (weighted.sum(), vec![1.0; objectives.len()]),
            Scalarisation::Tchebycheff { mu } => smooth_maximum(&weighted.collect::<Vec<_>>(), mu),
        };
        let mixed_slope: f64 = (0..slopes.len()).map(|i| shares[i] * preference[i] * slopes[i]).sum();
        let mixture: f64 =
            preference.iter().zip(&labels.margins).map(|(weight, margin)| weight * margin).sum();
        // A mixture of zero prefers neither answer.
        let direction = if mixture == 0.0 { 0.0 } else { mixture.signum() };
        let (global, global_slope) = logistic(direction * self.global_beta, difference);
        let slope = mixed_slope + self.global_weight * global_slope;
        let pulls = self.pulls(&preference, labels, answers);
        LossValue {
            total: mixed
                + self.global_weight * global
                + pulls[0] * answers[0].sum
                + pulls[1] * answers[1].sum,
            objectives,
            global,
            slopes: [slope + pulls[0], pulls[1] - slope],
        }
    }

    /// −α / tokens, times the weight of the objectives that prefer the answer.
    fn pulls(&self, preference: &[f64], labels: &Labels, answers: [Likelihood; 2]) -> [f64; 2] {
        let weight = |sign: f64| -> f64 {
            preference.iter().zip(&labels.signs).filter(|(_, s)| **s == sign).map(|(p, _)| p).sum()
        };
        let pull = |sign: f64, tokens: usize| -self.likelihood_weight * weight(sign) / tokens.max(1) as f64;
        [pull(1.0, answers[0].tokens), pull(-1.0, answers[1].tokens)]
    }
}

/// −log σ(scale · x) and its derivative by x.
fn logistic(scale: f64, x: f64) -> (f64, f64) {
    let argument = -scale * x;
    // log(1 + e^a) without overflow.
    let value = argument.max(0.0) + (-argument.abs()).exp().ln_1p();
    (value, -scale / (1.0 + (-argument).exp()))
}

/// μ log mean exp(x_i / μ), and its derivative by each x_i.
fn smooth_maximum(values: &[f64], mu: f64) -> (f64, Vec<f64>) {
    let top = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = values.iter().map(|value| ((value - top) / mu).exp()).collect();
    let sum: f64 = weights.iter().sum();
    (top + mu * (sum / values.len() as f64).ln(), weights.iter().map(|weight| weight / sum).collect())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // a test that panics has failed, and says where

    use super::*;

    fn loss(scalarisation: Scalarisation) -> Loss {
        Loss {
            scalarisation,
            betas: vec![0.1, 0.3],
            global_beta: 0.2,
            global_weight: 0.5,
            likelihood_weight: 0.7,
        }
    }

    /// Answers of three and five tokens whose sums are so far apart.
    fn answers(difference: f64) -> [Likelihood; 2] {
        [Likelihood { sum: difference - 9.0, tokens: 3 }, Likelihood { sum: -9.0, tokens: 5 }]
    }

    #[test]
    fn slopes_are_the_derivatives_of_the_total() {
        for scalarisation in [Scalarisation::Linear, Scalarisation::Tchebycheff { mu: 0.1 }] {
            let loss = loss(scalarisation);
            let labels = Labels { signs: vec![1.0, -1.0], margins: vec![0.4, -1.1] };
            for difference in [-30.0, -1.0, 0.0, 0.5, 40.0] {
                for side in [0, 1] {
                    let of = |step: f64| {
                        let mut answers = answers(difference);
                        answers[side].sum += step;
                        loss.of(&[0.3, 0.7], &labels, answers)
                    };
                    let h = 1e-5;
                    let measured = (of(h).total - of(-h).total) / (2.0 * h);
                    let slope = of(0.0).slopes[side];
                    assert!(
                        (measured - slope).abs() < 1e-7,
                        "{scalarisation:?} at {difference}: {measured} {slope}"
                    );
                }
            }
        }
    }

    #[test]
    fn linear_loss_is_soft_label_bradley_terry_at_equal_betas() {
        let loss = Loss {
            betas: vec![0.2, 0.2],
            global_weight: 0.0,
            likelihood_weight: 0.0,
            ..loss(Scalarisation::Linear)
        };
        let labels = Labels { signs: vec![1.0, -1.0], margins: vec![1.0, -1.0] };
        let (p, d) = (0.3_f64, 7.0_f64);
        let sigma = 1.0 / (1.0 + (-0.2 * d).exp());
        let expected = -(p * sigma.ln() + (1.0 - p) * (1.0 - sigma).ln());
        let total = loss.of(&[0.3, 0.7], &labels, answers(d)).total;
        assert!((total - expected).abs() < 1e-7, "{total} {expected}");
        // Pairs in conflict carry no signal where the target equals what the model says already.
        assert!(loss.of(&[0.5, 0.5], &labels, answers(0.0)).slopes[0].abs() < 1e-12);
    }

    #[test]
    fn likelihood_pulls_what_is_preferred_by_the_token() {
        let loss = Loss { betas: vec![1e-9; 2], global_weight: 0.0, ..loss(Scalarisation::Linear) };
        let labels = Labels { signs: vec![1.0, -1.0], margins: vec![1.0, -1.0] };
        let value = loss.of(&[0.25, 0.75], &labels, answers(3.0));
        let expected = 2_f64.ln() + 0.7 * (0.25 * 6.0 / 3.0 + 0.75 * 9.0 / 5.0);
        assert!((value.total - expected).abs() < 1e-7, "{} {expected}", value.total);
        // An objective that has no opinion pulls nothing.
        let labels = Labels { signs: vec![0.0, -1.0], margins: vec![0.0, -1.0] };
        assert!(loss.of(&[1.0, 0.0], &labels, answers(3.0)).slopes.iter().all(|slope| slope.abs() < 1e-7));
    }

    #[test]
    fn extreme_differences_stay_finite() {
        let labels = Labels { signs: vec![1.0, -1.0], margins: vec![0.0, 0.0] };
        for difference in [-1e6, 1e6] {
            let loss = loss(Scalarisation::Tchebycheff { mu: 0.01 });
            let value = loss.of(&[0.5, 0.5], &labels, answers(difference));
            assert!(value.total.is_finite() && value.slopes.iter().all(|slope| slope.is_finite()));
        }
    }
}
