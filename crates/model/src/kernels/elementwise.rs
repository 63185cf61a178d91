//! What happens to a row between the matrix products: normalisation, gating, rotation.

use super::simd::{F32x16, Isa, Kernel, LANES};

struct RmsNorm<'a> {
    residual: &'a mut [f32],
    delta: Option<&'a [f32]>,
    weight: &'a [f32],
    epsilon: f32,
    output: &'a mut [f32],
}

struct GatedSilu<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    output: &'a mut [f32],
}

/// residual += delta; output = weight · residual / sqrt(mean(residual²) + epsilon), for one row.
/// All have the row's length, a multiple of 16. (arXiv 1910.07467)
pub fn add_rms_norm(
    isa: Isa,
    residual: &mut [f32],
    delta: Option<&[f32]>,
    (weight, epsilon): (&[f32], f32),
    output: &mut [f32],
) {
    let len = residual.len();
    assert!(len.is_multiple_of(LANES) && weight.len() == len && output.len() == len);
    assert!(delta.is_none_or(|delta| delta.len() == len));
    isa.run(RmsNorm { residual, delta, weight, epsilon, output });
}

/// output = silu(gate) · up with silu(x) = x / (1 + e^-x), for runs of equal length, a multiple of 16.
pub fn gated_silu(isa: Isa, gate: &[f32], up: &[f32], output: &mut [f32]) {
    let len = output.len();
    assert!(len.is_multiple_of(LANES) && gate.len() == len && up.len() == len);
    isa.run(GatedSilu { gate, up, output });
}

/// Rotates pairs (i, i + half) of one head by the angles of a position and multiplies by `scale`.
/// `cosine` and `sine` have half the head's length. (arXiv 2104.09864, halves as in Hugging Face)
pub fn rotate(head: &mut [f32], cosine: &[f32], sine: &[f32], scale: f32) {
    let (low, high) = head.split_at_mut(cosine.len());
    for (((a, b), cosine), sine) in low.iter_mut().zip(high).zip(cosine).zip(sine) {
        // Plain operations, which the compiler may vectorise but not contract: the same bits everywhere.
        let rotated = (*a * cosine - *b * sine, *b * cosine + *a * sine);
        (*a, *b) = (rotated.0 * scale, rotated.1 * scale);
    }
}

impl Kernel for RmsNorm<'_> {
    #[inline(always)]
    fn run<V: F32x16>(self) {
        let len = self.residual.len();
        let (residual, output) = (self.residual.as_mut_ptr(), self.output.as_mut_ptr());
        // Safety: all runs have `len` floats, a multiple of 16.
        unsafe {
            let mut squares = V::splat(0.0);
            for at in (0..len).step_by(LANES) {
                let mut x = V::load(residual.add(at));
                if let Some(delta) = self.delta {
                    x = x.add(V::load(delta.as_ptr().add(at)));
                    x.store(residual.add(at));
                }
                squares = x.mul_add(x, squares);
            }
            let scale = V::splat(1.0 / (squares.sum() / len as f32 + self.epsilon).sqrt());
            for at in (0..len).step_by(LANES) {
                let x = V::load(residual.add(at)).mul(scale);
                x.mul(V::load(self.weight.as_ptr().add(at))).store(output.add(at));
            }
        }
    }
}

impl Kernel for GatedSilu<'_> {
    #[inline(always)]
    fn run<V: F32x16>(self) {
        let output = self.output.as_mut_ptr();
        // Safety: all runs have the same length, a multiple of 16.
        unsafe {
            for at in (0..self.output.len()).step_by(LANES) {
                let gate = V::load(self.gate.as_ptr().add(at));
                let denominator = gate.mul(V::splat(-1.0)).exp().add(V::splat(1.0));
                let up = V::load(self.up.as_ptr().add(at));
                gate.div(denominator).mul(up).store(output.add(at));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(count: usize, width: f32) -> Vec<f32> {
        (0..count).map(|i| ((i * 7919 % 1013) as f32 / 506.5 - 1.0) * width).collect()
    }

    #[test]
    fn norm_and_silu_are_the_definition_with_the_same_bits_on_every_instruction_set() {
        let (x, delta, weight) = (numbers(80, 3.0), numbers(80, 1.0), numbers(80, 2.0));
        let mut bits = Vec::new();
        for isa in Isa::available() {
            let (mut residual, mut normed, mut gated) = (x.clone(), vec![0.0; 80], vec![0.0; 80]);
            add_rms_norm(isa, &mut residual, Some(&delta), (&weight, 1e-5), &mut normed);
            gated_silu(isa, &residual, &weight, &mut gated);
            let mean = residual.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / 80.0;
            for i in 0..80 {
                let x = f64::from(residual[i]);
                assert_eq!(residual[i], self::numbers(80, 3.0)[i] + delta[i]);
                let exact = x / (mean + 1e-5).sqrt() * f64::from(weight[i]);
                assert!((f64::from(normed[i]) - exact).abs() < 1e-6, "{} norm {i}", isa.name());
                let exact = x / (1.0 + (-x).exp()) * f64::from(weight[i]);
                assert!((f64::from(gated[i]) - exact).abs() < 1e-6, "{} silu {i}", isa.name());
            }
            bits.push(normed.iter().chain(&gated).map(|x| x.to_bits()).collect::<Vec<_>>());
        }
        assert!(bits.iter().all(|other| *other == bits[0]));
    }

    #[test]
    fn silu_of_large_arguments_is_finite() {
        let gate = [[-1e30f32; 8], [1e30; 8]].concat();
        let mut output = [0.0; 16];
        gated_silu(Isa::best(), &gate, &[1.0; 16], &mut output);
        assert!(output[0].abs() < 1e-7 && output[8] == 1e30, "{output:?}");
    }
}
