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
//! Everything is a function of D alone, so one number per pair, dL/dD, is all that the network needs to know.

/// How the losses of the objectives become one.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
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
    /// dL/dD
    pub slope: f64,
}

// === impl Loss ===

impl Loss {
    /// `difference` is D.
    pub fn of(&self, preference: &[f32], labels: &Labels, difference: f64) -> LossValue {
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
        LossValue {
            total: mixed + self.global_weight * global,
            objectives,
            global,
            slope: mixed_slope + self.global_weight * global_slope,
        }
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
        Loss { scalarisation, betas: vec![0.1, 0.3], global_beta: 0.2, global_weight: 0.5 }
    }

    #[test]
    fn slope_is_the_derivative_of_the_total() {
        for scalarisation in [Scalarisation::Linear, Scalarisation::Tchebycheff { mu: 0.1 }] {
            let loss = loss(scalarisation);
            let labels = Labels { signs: vec![1.0, -1.0], margins: vec![0.4, -1.1] };
            for difference in [-30.0, -1.0, 0.0, 0.5, 40.0] {
                let of = |d: f64| loss.of(&[0.3, 0.7], &labels, d);
                let h = 1e-5;
                let measured = (of(difference + h).total - of(difference - h).total) / (2.0 * h);
                let slope = of(difference).slope;
                assert!(
                    (measured - slope).abs() < 1e-7,
                    "{scalarisation:?} at {difference}: {measured} {slope}"
                );
            }
        }
    }

    #[test]
    fn linear_loss_is_soft_label_bradley_terry_at_equal_betas() {
        let loss = Loss { betas: vec![0.2, 0.2], global_weight: 0.0, ..loss(Scalarisation::Linear) };
        let labels = Labels { signs: vec![1.0, -1.0], margins: vec![1.0, -1.0] };
        let (p, d) = (0.3_f64, 7.0_f64);
        let sigma = 1.0 / (1.0 + (-0.2 * d).exp());
        let expected = -(p * sigma.ln() + (1.0 - p) * (1.0 - sigma).ln());
        let total = loss.of(&[0.3, 0.7], &labels, d).total;
        assert!((total - expected).abs() < 1e-7, "{total} {expected}");
        // Pairs in conflict carry no signal where the target equals what the model says already.
        assert!(loss.of(&[0.5, 0.5], &labels, 0.0).slope.abs() < 1e-12);
    }

    #[test]
    fn extreme_differences_stay_finite() {
        let labels = Labels { signs: vec![1.0, -1.0], margins: vec![0.0, 0.0] };
        for difference in [-1e6, 1e6] {
            let value = loss(Scalarisation::Tchebycheff { mu: 0.01 }).of(&[0.5, 0.5], &labels, difference);
            assert!(value.total.is_finite() && value.slope.is_finite());
        }
    }
}
