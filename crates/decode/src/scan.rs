//! Passes over a whole vocabulary: what must be fast, and nothing that decides.
//!
//! Rows hold no NaN (see [`crate::guidance`]). Each pass looks at a block's maximum first and skips what
//! cannot matter.

use crate::elementary::weight;
use crate::noise::{BLOCK, NOISE_MAX, Noise, gumbel, gumbel_bound};

const LANES: usize = 16;

/// A place in an order of tokens: larger values first, ties to the lower id.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Rank {
    pub(crate) value: f32,
    pub(crate) id: u32,
}

impl Rank {
    /// Below every token.
    pub(crate) const LAST: Self = Self { value: f32::NEG_INFINITY, id: u32::MAX };

    #[inline(always)]
    pub(crate) fn above(self, other: Self) -> bool {
        self.value > other.value || (self.value == other.value && self.id < other.id)
    }

    /// For sorting best first.
    pub(crate) fn order(&self, other: &Self) -> std::cmp::Ordering {
        other.above(*self).cmp(&self.above(*other))
    }
}

#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    // Written so that it is one instruction: `f32::max` spends three on NaN.
    if a > b { a } else { b }
}

#[inline(always)]
fn block_max(block: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = block.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane = larger(value, *lane);
        }
    }
    for (lane, &value) in lanes.iter_mut().zip(rest) {
        *lane = larger(value, *lane);
    }
    lanes.into_iter().fold(f32::NEG_INFINITY, larger)
}

widest! {
    pub(crate) fn max(row: &[f32]) -> f32 {
        block_max(row)
    }
}

widest! {
    /// The first of the largest.
    pub(crate) fn argmax(row: &[f32]) -> Option<Rank> {
        let mut best: Option<Rank> = None;
        for (index, block) in row.chunks(BLOCK).enumerate() {
            let value = block_max(block);
            if best.is_none_or(|best| value > best.value) {
                let offset = block.iter().position(|&x| x == value).unwrap_or(0);
                best = Some(Rank { value, id: (index * BLOCK + offset) as u32 });
            }
        }
        best
    }
}

widest! {
    /// The `k` best of a row, best first. NaN, which only a foreign row has, counts as −∞.
    pub(crate) fn top(row: &[f32], k: usize, out: &mut Vec<Rank>) {
        #[inline(always)]
        fn push(out: &mut Vec<Rank>, index: usize, value: f32) {
            out.push(Rank { value: larger(value, f32::NEG_INFINITY), id: index as u32 });
        }
        // The value of the k-th best so far; later tokens must exceed it, because ties go to the lower id.
        fn prune(out: &mut Vec<Rank>, k: usize) -> f32 {
            if out.len() > k {
                out.select_nth_unstable_by(k - 1, Rank::order);
                out.truncate(k);
                return out[k - 1].value;
            }
            out.iter().fold(f32::INFINITY, |bar, rank| if rank.value < bar { rank.value } else { bar })
        }
        out.clear();
        if k == 0 {
            return;
        }
        let (head, tail) = row.split_at(k.min(row.len()));
        for (index, &value) in head.iter().enumerate() {
            push(out, index, value);
        }
        let mut bar = prune(out, k);
        for (block_index, block) in tail.chunks(BLOCK).enumerate() {
            if block_max(block) > bar {
                for (offset, &value) in block.iter().enumerate() {
                    if value > bar {
                        push(out, k + block_index * BLOCK + offset, value);
                    }
                }
                if out.len() >= 2 * k + BLOCK {
                    bar = prune(out, k);
                }
            }
        }
        prune(out, k);
        out.sort_unstable_by(Rank::order);
    }
}

widest! {
    /// Sum of the weights relative to `max`, the row's largest value.
    pub(crate) fn total_weight(row: &[f32], max: f32) -> u64 {
        row.iter().fold(0, |sum: u64, &value| sum.wrapping_add(weight(value, max)))
    }
}

widest! {
    /// How many tokens rank above.
    pub(crate) fn count_above(row: &[f32], rank: Rank) -> usize {
        let (before, after) = row.split_at((rank.id as usize).min(row.len()));
        let ties = before.iter().fold(0, |sum: u32, &x| sum.wrapping_add(u32::from(x >= rank.value)));
        let above = after.iter().fold(0, |sum: u32, &x| sum.wrapping_add(u32::from(x > rank.value)));
        ties.wrapping_add(above) as usize
    }
}

widest! {
    /// Sum of the weights of the tokens that rank above.
    pub(crate) fn weight_above(row: &[f32], rank: Rank, max: f32) -> u64 {
        let (before, after) = row.split_at((rank.id as usize).min(row.len()));
        let mut sum = 0_u64;
        for block in before.chunks(BLOCK) {
            if block_max(block) >= rank.value {
                for &x in block {
                    sum = sum.wrapping_add(if x >= rank.value { weight(x, max) } else { 0 });
                }
            }
        }
        for block in after.chunks(BLOCK) {
            if block_max(block) > rank.value {
                for &x in block {
                    sum = sum.wrapping_add(if x > rank.value { weight(x, max) } else { 0 });
                }
            }
        }
        sum
    }
}

widest! {
    /// Appends the ids that rank above.
    pub(crate) fn collect_above(row: &[f32], rank: Rank, out: &mut Vec<u32>) {
        for (index, block) in row.chunks(BLOCK).enumerate() {
            if block_max(block) >= rank.value {
                for (offset, &value) in block.iter().enumerate() {
                    let id = (index * BLOCK + offset) as u32;
                    if (Rank { value, id }).above(rank) {
                        out.push(id);
                    }
                }
            }
        }
    }
}

widest! {
    /// The best of value + noise among the tokens that rank above `cut` by their values.
    pub(crate) fn best_noisy(row: &[f32], cut: Rank, noise: &Noise, position: u32) -> Option<Rank> {
        // The most probable token is likely to win or to come near: what cannot reach it is passed over from
        // the start.
        let start = argmax(row).filter(|first| first.above(cut))?;
        let mut best = Rank { value: start.value + noise.at(position, start.id), id: start.id };
        visit_noisy(row, cut, noise, position, best.value, |score| {
            if score.above(best) {
                best = score;
            }
            best.value
        });
        Some(best)
    }
}

widest! {
    /// Appends the ids that rank above `cut` by their values and above `bar` by value + noise.
    pub(crate) fn collect_noisy(row: &[f32], cut: Rank, bar: Rank, noise: &Noise, position: u32, out: &mut Vec<u32>) {
        visit_noisy(row, cut, noise, position, bar.value, |score| {
            if score.above(bar) {
                out.push(score.id);
            }
            bar.value
        });
    }
}

/// Calls `visit` with value + noise of every token that ranks above `cut` and may reach `bar`; it returns
/// the next bar.
///
/// The noise itself is computed only where its cheap bound, rounded the same way, does not rule a token out.
#[inline(always)]
fn visit_noisy(
    row: &[f32],
    cut: Rank,
    noise: &Noise,
    position: u32,
    mut bar: f32,
    mut visit: impl FnMut(Rank) -> f32,
) {
    for (index, block) in row.chunks(BLOCK).enumerate() {
        let largest = block_max(block);
        if largest < cut.value || largest + NOISE_MAX < bar {
            continue;
        }
        let first = (index * BLOCK) as u32;
        let words = noise.words(position, first);
        let mut bounds = [f32::NEG_INFINITY; BLOCK];
        for ((bound, &value), &word) in bounds.iter_mut().zip(block).zip(&words) {
            *bound = value + gumbel_bound(word);
        }
        if block_max(&bounds) < bar {
            continue;
        }
        for (offset, &value) in block.iter().enumerate() {
            let id = first + offset as u32;
            if bounds[offset] >= bar && (Rank { value, id }).above(cut) {
                bar = visit(Rank { value: value + gumbel(words[offset]), id });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_top_of_a_row_is_what_sorting_gives_even_with_ties_and_infinities() {
        let row: Vec<f32> = (0..1000_u32)
            .map(|i| match i % 97 {
                0 => f32::NAN,
                1 => f32::NEG_INFINITY,
                2 => f32::INFINITY,
                _ => (i.wrapping_mul(2_654_435_761) >> 26) as f32,
            })
            .collect();
        let mut sorted: Vec<Rank> = (0_u32..)
            .zip(&row)
            .map(|(id, &value)| Rank { value: if value.is_nan() { f32::NEG_INFINITY } else { value }, id })
            .collect();
        sorted.sort_by(Rank::order);
        for k in [0, 1, 31, 32, 500, 990, 1000, 2000] {
            let mut out = Vec::new();
            top(&row, k, &mut out);
            assert_eq!(out, sorted[..k.min(1000)], "k = {k}");
        }
        assert_eq!(argmax(&row), Some(Rank { value: f32::INFINITY, id: 2 }));
    }
}
