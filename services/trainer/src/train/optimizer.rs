//! AdamW (Loshchilov, Hutter, 2019) over one flat vector, its schedule, and the length of a gradient.

use std::f64::consts::PI;

use super::config::OptimizerConfig;

/// Moments of the gradient: what a checkpoint keeps beside the parameters.
#[derive(Clone, Debug, PartialEq)]
pub struct AdamW {
    pub first: Vec<f32>,
    pub second: Vec<f32>,
}

// === impl AdamW ===

impl AdamW {
    pub fn new(parameters: usize) -> Self {
        Self { first: vec![0.0; parameters], second: vec![0.0; parameters] }
    }

    /// One step; `step` counts from 0.
    pub fn step(
        &mut self,
        config: &OptimizerConfig,
        step: u64,
        rate: f64,
        parameters: &mut [f32],
        gradient: &[f32],
    ) {
        let [beta1, beta2] = config.betas;
        let corrections = config.betas.map(|beta| 1.0 - beta.powf(step as f64 + 1.0));
        let (decay, epsilon) = ((1.0 - rate * config.weight_decay) as f32, config.epsilon as f32);
        let (keep1, keep2) = (beta1 as f32, beta2 as f32);
        let (add1, add2) = ((1.0 - beta1) as f32, (1.0 - beta2) as f32);
        let (rate, root) = ((rate / corrections[0]) as f32, corrections[1].sqrt() as f32);
        for (i, parameter) in parameters.iter_mut().enumerate() {
            let g = gradient[i];
            let first = keep1 * self.first[i] + add1 * g;
            let second = keep2 * self.second[i] + add2 * g * g;
            (self.first[i], self.second[i]) = (first, second);
            *parameter = decay * *parameter - rate * first / (second.sqrt() / root + epsilon);
        }
    }
}

/// Learning rate of a step, from 0: a line up to the peak, then half a cosine down to the floor.
pub fn learning_rate(config: &OptimizerConfig, step: u64, steps: u64) -> f64 {
    let (peak, warm_up) = (config.learning_rate, config.warm_up_steps.min(steps));
    if step < warm_up {
        return peak * (step + 1) as f64 / warm_up as f64;
    }
    let done = (step - warm_up) as f64 / (steps - warm_up).max(1) as f64;
    peak * (config.floor + (1.0 - config.floor) * 0.5 * (1.0 + (PI * done.min(1.0)).cos()))
}

/// Shortens a gradient that is longer than `longest` (0: any), and says how long it was.
pub fn clip(gradient: &mut [f32], longest: f64) -> f64 {
    let norm = gradient.iter().map(|g| f64::from(*g) * f64::from(*g)).sum::<f64>().sqrt();
    if longest > 0.0 && norm > longest {
        let scale = (longest / norm) as f32;
        gradient.iter_mut().for_each(|g| *g *= scale);
    }
    norm
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The page of the paper, one number at a time, in f64.
    fn plain(config: &OptimizerConfig, rates: &[f64], start: f64, gradients: &[f64]) -> f64 {
        let (mut x, mut m, mut v) = (start, 0.0, 0.0);
        for (t, (g, rate)) in gradients.iter().zip(rates).enumerate() {
            m = config.betas[0] * m + (1.0 - config.betas[0]) * g;
            v = config.betas[1] * v + (1.0 - config.betas[1]) * g * g;
            let m_hat = m / (1.0 - config.betas[0].powi(t as i32 + 1));
            let v_hat = v / (1.0 - config.betas[1].powi(t as i32 + 1));
            x -= rate * config.weight_decay * x;
            x -= rate * m_hat / (v_hat.sqrt() + config.epsilon);
        }
        x
    }

    #[test]
    fn two_hundred_steps_follow_the_plain_reference() {
        let config = OptimizerConfig { weight_decay: 0.1, floor: 0.1, ..OptimizerConfig::default() };
        let rates: Vec<f64> = (0..200).map(|step| learning_rate(&config, step, 200)).collect();
        let starts = [0.0_f32, 1.0, -3.0, 1e-4];
        let gradient =
            |step: usize, i: usize| ((step * 7 + i * 3) as f32 * 0.37).sin() * 10f32.powi(i as i32 - 3);
        let (mut parameters, mut adam) = (starts.to_vec(), AdamW::new(4));
        for (step, rate) in rates.iter().enumerate() {
            let gradient: Vec<f32> = (0..4).map(|i| gradient(step, i)).collect();
            adam.step(&config, step as u64, *rate, &mut parameters, &gradient);
        }
        for i in 0..4 {
            let gradients: Vec<f64> = (0..200).map(|step| f64::from(gradient(step, i))).collect();
            let expected = plain(&config, &rates, f64::from(starts[i]), &gradients);
            assert!((f64::from(parameters[i]) - expected).abs() < 2e-6, "{i}: {} {expected}", parameters[i]);
        }
    }

    #[test]
    fn first_steps_are_those_computed_by_hand() {
        let config = OptimizerConfig { weight_decay: 0.5, epsilon: 0.0, ..OptimizerConfig::default() };
        let (mut parameters, mut adam) = (vec![2.0], AdamW::new(1));
        // The first corrected step has the length of the rate, whatever the gradient: 2 − 0.1·0.5·2 − 0.1.
        adam.step(&config, 0, 0.1, &mut parameters, &[-4e-3]);
        assert!((parameters[0] - 2.0_f32).abs() < 1e-6, "{parameters:?}");
        adam.step(&config, 1, 0.1, &mut parameters, &[-4e-3]);
        assert!((parameters[0] - 2.0_f32).abs() < 1e-6, "{parameters:?}");
        adam.step(&config, 2, 0.1, &mut parameters, &[4e-3]);
        // m̂ = (−0.1·(0.81 + 0.9) + 0.1) · 4e-3 / 0.271 = −0.262·4e-3, v̂ = (4e-3)²: 2 − 0.1 + 0.0262.
        assert!((parameters[0] - 1.926_2).abs() < 1e-4, "{parameters:?}");
    }

    #[test]
    fn rate_rises_to_the_peak_and_falls_to_the_floor() {
        let config = OptimizerConfig {
            learning_rate: 1.0,
            floor: 0.2,
            warm_up_steps: 4,
            ..OptimizerConfig::default()
        };
        let rates: Vec<f64> = (0..=14).map(|step| learning_rate(&config, step, 14)).collect();
        assert_eq!(rates[..5], [0.25, 0.5, 0.75, 1.0, 1.0]);
        assert!((rates[9] - 0.6).abs() < 1e-12 && (rates[14] - 0.2).abs() < 1e-12, "{rates:?}");
        // A run shorter than its warm-up still ends.
        assert!((learning_rate(&config, 1, 2) - 1.0).abs() < 1e-12);
    }

    #[test]
    fn only_long_gradients_are_shortened() {
        let mut gradient = [3.0, 4.0];
        assert_eq!(clip(&mut gradient, 0.0), 5.0);
        assert_eq!(clip(&mut gradient, 6.0), 5.0);
        assert_eq!(gradient, [3.0, 4.0]);
        assert_eq!(clip(&mut gradient, 1.0), 5.0);
        assert!((gradient[0] - 0.6).abs() < 1e-6 && (gradient[1] - 0.8).abs() < 1e-6);
    }
}
