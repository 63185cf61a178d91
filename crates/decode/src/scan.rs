//! Passes over a whole vocabulary: what must be fast, and nothing that decides.
//!
//! Rows hold no NaN (see [`crate::guidance`]). Each pass looks at a block's maximum first and skips what
//! cannot matter.

use crate::elementary::{SHIFT, shifted_weight, weight};
use crate::noise::{BLOCK, BOUND_OF_ZERO, BOUND_STEP, NOISE_MAX, Noise, bound_steps, gumbel};

const LANES: usize = 16;

/// A place in an order of tokens: larger values first, ties to the lower id.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Rank {
    pub(crate) value: f32,
    pub(crate) id: u32,
}

/// The noise of one position.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Draw<'a> {
    pub(crate) noise: &'a Noise,
    pub(crate) position: u32,
}

/// A pass over tokens that the noise may lift.
struct NoisyPass<'a> {
    draw: Draw<'a>,
    scale: f32,
    /// Smaller values are passed over.
    least: f32,
}

/// What it takes to reach a score.
#[derive(Clone, Copy)]
struct Bar {
    /// Smaller values cannot reach it even with the largest noise.
    least: f32,
    /// Nor can a token whose [`bound_steps`] are more than factor · value + constant: that is scale · value + bound < score,
    /// in fewer operations. It is a little generous: close calls have |scale · value| ≤ |score| + 110, of which all roundings
    /// make up less than a millionth, and the slack is ten times that. Of a score out of all proportion it rules out nobody.
    factor: f32,
    constant: f32,
}

impl Rank {
    /// Below every token.
    pub(crate) const LAST: Self = Self { value: f32::NEG_INFINITY, id: u32::MAX };
    /// Where to begin a search for the largest: what is chosen when nothing exceeds −∞.
    pub(crate) const NONE: Self = Self { value: f32::NEG_INFINITY, id: 0 };

    #[inline(always)]
    pub(crate) fn above(self, other: Self) -> bool {
        self.value > other.value || (self.value == other.value && self.id < other.id)
    }

    /// Numbers in the order of ranks, best first. The value is a number.
    #[inline(always)]
    fn place(&self) -> u64 {
        let bits = (self.value + 0.0).to_bits() as i32; // one zero
        let ascending = bits ^ ((bits >> 31) & i32::MAX);
        u64::from(!(ascending as u32 ^ 1 << 31)) << 32 | u64::from(self.id)
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

/// The largest of some values, NaN aside; −∞ of none.
#[inline(always)]
fn block_max(block: &[f32]) -> f32 {
    // As whole numbers in the same order: their maximum is associative, so that the compiler takes it in vectors, and
    // halves these at the end. (It strings comparisons of floats one after the other.)
    #[inline(always)]
    fn key(value: f32) -> i32 {
        let bits = value.to_bits() as i32;
        bits ^ ((bits >> 31) & i32::MAX)
    }
    #[inline(always)]
    fn largest(block: &[f32]) -> i32 {
        let keys = block.iter().map(|&value| key(larger(value, f32::NEG_INFINITY)));
        keys.fold(key(f32::NEG_INFINITY), i32::max)
    }
    let key = match block.as_array::<BLOCK>() {
        Some(whole) => largest(whole), // no loop
        None => largest(block),
    };
    f32::from_bits((key ^ ((key >> 31) & i32::MAX)) as u32)
}

/// Whether a test holds for any value of a block.
#[inline(always)]
fn any(block: &[f32], test: impl Fn(f32) -> bool) -> bool {
    // Without a way out early, so that it is a few comparisons of vectors.
    match block.as_array::<BLOCK>() {
        Some(whole) => whole.iter().fold(false, |any, &value| any | test(value)),
        None => block.iter().fold(false, |any, &value| any | test(value)),
    }
}

widest! {
    pub(crate) fn max(row: &[f32]) -> f32 {
        block_max(row)
    }
}

widest! {
    /// The first of the largest; token 0 where none is larger than −∞.
    pub(crate) fn argmax(row: &[f32]) -> Rank {
        raise(row, 0, Rank::NONE, |rank| rank)
    }
}

/// The better one of `best` and the first of the largest among the tokens from `first` on, whose values `row` holds; as
/// `judge` sees them, which may lower a value.
#[inline(always)]
pub(crate) fn raise(row: &[f32], first: u32, mut best: Rank, judge: impl Fn(Rank) -> Rank) -> Rank {
    for (block, first) in row.chunks(BLOCK).zip((first..).step_by(BLOCK)) {
        if any(block, |value| value > best.value) {
            for (&value, id) in block.iter().zip(first..) {
                if value > best.value {
                    let judged = judge(Rank { value, id });
                    best = if judged.value > best.value { judged } else { best };
                }
            }
        }
    }
    best
}

widest! {
    /// The `k` best of a row, best first. NaN, which only a foreign row has, counts as −∞.
    ///
    /// The `k` best groups of tokens, by their maxima and then by their place, hold the `k` best tokens: their maxima
    /// rank above every token of every other group. So all but these groups is read once, and compared with nothing.
    pub(crate) fn top(row: &[f32], k: usize, out: &mut Vec<Rank>) {
        out.clear();
        if k == 0 {
            return;
        }
        let (group, bar) = best_groups(row, k, out);
        let groups = out.len();
        let all = groups < k || bar == f32::NEG_INFINITY;
        for index in 0..groups {
            let first = out[index].id as usize * group;
            let tokens = &row[first..row.len().min(first + group)];
            for (lanes, first) in tokens.chunks(LANES).zip((first as u32..).step_by(LANES)) {
                if !all && !any(lanes, |value| value >= bar) {
                    continue;
                }
                for (&value, id) in lanes.iter().zip(first..) {
                    let value = larger(value, f32::NEG_INFINITY);
                    if all || value >= bar {
                        out.push(Rank { value, id });
                    }
                }
            }
        }
        out.drain(..groups);
        keep_best(out, k);
        out.sort_unstable_by(Rank::order);
    }
}

/// The `k` groups of tokens with the largest maxima, in no order: each one's maximum, and its number in place of an id. Returns how
/// many tokens a group has, and the least of these maxima.
#[inline(always)]
fn best_groups(row: &[f32], k: usize, out: &mut Vec<Rank>) -> (usize, f32) {
    // Few groups mean long ones to search, many mean much to select from.
    let group = if row.len() / BLOCK >= 2 * k { BLOCK } else { LANES };
    // Not by `extend`: what runs inside the standard library is compiled for the baseline.
    out.reserve(row.len().div_ceil(group));
    for (group, id) in row.chunks(group).zip(0..) {
        out.push(Rank { value: block_max(group), id });
    }
    (group, keep_best(out, k))
}

/// Drops all but the `k` best, and returns the least value that is left; the last one has it, if any were dropped.
#[inline(always)]
fn keep_best(out: &mut Vec<Rank>, k: usize) -> f32 {
    if out.len() > k {
        out.select_nth_unstable_by_key(k - 1, |rank| rank.place());
        out.truncate(k);
        out[k - 1].value
    } else {
        out.iter().fold(f32::INFINITY, |least, rank| if rank.value < least { rank.value } else { least })
    }
}

widest! {
    /// Sum of the weights relative to `max`, the row's largest value.
    pub(crate) fn total_weight(row: &[f32], max: f32) -> u64 {
        if max.is_infinite() {
            return row.iter().fold(0, |sum: u64, &value| sum.wrapping_add(weight(value, max)));
        }
        let sum = row.iter().fold(0, |sum: u64, &value| sum.wrapping_add(shifted_weight(value, max)));
        sum.wrapping_sub(SHIFT.wrapping_mul(row.len() as u64))
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
    /// Appends the ids of the values that are at least `least`, in their order.
    pub(crate) fn collect_from(row: &[f32], least: f32, out: &mut Vec<u32>) {
        for (block, first) in row.chunks(BLOCK).zip((0..).step_by(BLOCK)) {
            if any(block, |value| value >= least) {
                out.extend(block.iter().zip(first..).filter(|&(&value, _)| value >= least).map(|(_, id): (_, u32)| id));
            }
        }
    }
}

widest! {
    /// The best of value + noise among the tokens that rank above `cut` by their values.
    pub(crate) fn best_noisy(row: &[f32], draw: Draw<'_>, cut: Rank) -> Option<Rank> {
        // The most probable token is likely to win or to come near: what cannot reach it is passed over from
        // the start.
        let start = raise(row, 0, Rank::NONE, |rank| rank);
        if !start.above(cut) {
            return None;
        }
        let mut best = Rank { value: start.value + draw.of(start.id), id: start.id };
        let pass = NoisyPass { draw, scale: 1.0, least: cut.value };
        pass.visit(row, 0, best.value, |value, id, word| {
            let score = Rank { value: value + gumbel(word), id };
            if (Rank { value, id }).above(cut) && score.above(best) {
                best = score;
            }
            best.value
        });
        Some(best)
    }
}

/// The better one of `best` and the best of value / divisor + noise among the tokens from `first` on, whose values `row`
/// holds; as `judge` sees them, which may lower a score.
#[inline(always)]
pub(crate) fn raise_noisy(
    (row, first): (&[f32], u32),
    divisor: f32,
    draw: Draw<'_>,
    mut best: Rank,
    judge: impl Fn(Rank) -> Rank,
) -> Rank {
    let pass = NoisyPass { draw, scale: 1.0 / divisor, least: f32::NEG_INFINITY };
    pass.visit(row, first, best.value, |value, id, word| {
        let score = Rank { value: value / divisor + gumbel(word), id };
        if score.above(best) {
            let judged = judge(score);
            best = if judged.above(best) { judged } else { best };
        }
        best.value
    });
    best
}

widest! {
    /// Appends the ids that rank above `cut` by their values and above `bar` by value + noise.
    pub(crate) fn collect_noisy(row: &[f32], draw: Draw<'_>, cut: Rank, bar: Rank, out: &mut Vec<u32>) {
        let pass = NoisyPass { draw, scale: 1.0, least: cut.value };
        pass.visit(row, 0, bar.value, |value, id, word| {
            if (Rank { value, id }).above(cut) && (Rank { value: value + gumbel(word), id }).above(bar) {
                out.push(id);
            }
            bar.value
        });
    }
}

widest! {
    /// Appends the ids whose scale · value + noise may reach `bar`.
    pub(crate) fn collect_reaching(row: &[f32], draw: Draw<'_>, scale: f32, bar: f32, out: &mut Vec<u32>) {
        NoisyPass { draw, scale, least: f32::NEG_INFINITY }.visit(row, 0, bar, |_, id, _| {
            out.push(id);
            bar
        });
    }
}

widest! {
    /// The `k` best of a row by noise + scale · value, best first; fewer where not so many are numbers. The tokens are
    /// those from `first` on, a multiple of four.
    pub(crate) fn top_noisy(tokens: (&[f32], u32), draw: Draw<'_>, scale: f32, k: usize, out: &mut Vec<Rank>) {
        let (row, first) = tokens;
        // Probable tokens set a bar that few others reach: more of them than are asked for, because the noise puts some of
        // these far down.
        out.clear();
        if k == 0 {
            return;
        }
        let (group, _) = best_groups(row, 2 * k, out);
        for best in out.iter_mut() {
            let start = best.id as usize * group;
            let tokens = &row[start..row.len().min(start + group)];
            let place = tokens.iter().position(|&value| value == best.value);
            best.id = (start + place.unwrap_or(0)) as u32; // none: all of them are −∞, or no numbers
        }
        for token in out.iter_mut() {
            token.value = draw.of(first.wrapping_add(token.id)) + scale * token.value;
        }
        let mut bar = if out.len() < k { f32::NEG_INFINITY } else { keep_best(out, k) };
        out.clear();
        let pass = NoisyPass { draw, scale, least: f32::NEG_INFINITY };
        pass.visit(row, first, bar, |value, id, word| {
            let value = gumbel(word) + scale * value;
            if value >= bar {
                out.push(Rank { value, id });
            }
            if out.len() == 2 * k {
                bar = keep_best(out, k);
            }
            bar
        });
        keep_best(out, k);
        out.sort_unstable_by(Rank::order);
    }
}

/// Asks for a block of memory, wherever it is.
#[inline(always)]
fn fetch(block: *const f32) {
    #[cfg(target_arch = "x86_64")]
    for line in (0..BLOCK).step_by(64 / size_of::<f32>()) {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: a hint, which reads nothing and never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(block.wrapping_add(line).cast()) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = block;
}

impl Draw<'_> {
    #[inline(always)]
    pub(crate) fn of(self, token: u32) -> f32 {
        self.noise.at(self.position, token)
    }
}

impl NoisyPass<'_> {
    /// Calls `visit` with value, id and random word of every token whose value is at least `least` and whose
    /// scale · value + noise may reach `bar`, and of a few others, in the order of ids; it returns the next bar. The tokens
    /// are those from `first` on, and their values `row`.
    ///
    /// The noise itself is left to `visit`: its cheap bound rules most tokens out.
    #[inline(always)]
    fn visit(&self, row: &[f32], first: u32, bar: f32, mut visit: impl FnMut(f32, u32, u32) -> f32) {
        let mut last = [f32::NEG_INFINITY; BLOCK];
        let mut bar = self.bar(bar);
        for start in (0..row.len()).step_by(BLOCK) {
            let tokens = &row[start..];
            let block = tokens.first_chunk::<BLOCK>().unwrap_or_else(|| {
                last[..tokens.len()].copy_from_slice(tokens);
                &last
            });
            let first = first.wrapping_add(start as u32);
            if !any(block, |value| value >= bar.least) {
                continue;
            }
            let words = self.draw.noise.words(self.draw.position, first);
            // Rows of a step lie one behind the other: while this one is computed with, the next one is brought into the cache.
            fetch(row.as_ptr_range().end.wrapping_add(start));
            // Without a way out early, so that it is a few comparisons of vectors.
            let pairs = block.iter().zip(&words);
            if pairs.fold(true, |all, (&value, &word)| all & bar.rules_out(value, word)) {
                continue;
            }
            let lanes =
                block.chunks(LANES).zip(words.chunks(LANES)).zip((0..tokens.len().min(BLOCK)).step_by(LANES));
            for ((values, words), start) in lanes {
                let pairs = values.iter().zip(words);
                if pairs.fold(true, |all, (&value, &word)| all & bar.rules_out(value, word)) {
                    continue;
                }
                for offset in 0..LANES.min(tokens.len() - start) {
                    if !bar.rules_out(values[offset], words[offset]) {
                        let id = first.wrapping_add((start + offset) as u32);
                        bar = self.bar(visit(values[offset], id, words[offset]));
                    }
                }
            }
        }
    }

    #[inline(always)]
    fn bar(&self, score: f32) -> Bar {
        const MODERATE: f32 = 1e30; // of more the solution may overflow
        let magnitude = score.abs() + 4.0 * NOISE_MAX;
        let slack = magnitude / 65_536.0;
        let least = (score - NOISE_MAX - slack) / self.scale;
        let solved = magnitude <= MODERATE;
        Bar {
            least: if least > self.least { least } else { self.least },
            factor: if solved { self.scale / BOUND_STEP } else { 0.0 },
            constant: if solved { (BOUND_OF_ZERO - score + slack) / BOUND_STEP } else { f32::MAX },
        }
    }
}

impl Bar {
    /// Whether a token of that value and random word cannot reach it.
    #[inline(always)]
    fn rules_out(&self, value: f32, word: u32) -> bool {
        bound_steps(word) > value * self.factor + self.constant
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
        assert_eq!(argmax(&row), Rank { value: f32::INFINITY, id: 2 });
    }

    /// Values and noise of a row at a position; sizes from 1e-12 to 1e35, and infinities.
    fn scene(case: u32) -> (Noise, Vec<f32>) {
        let noise = Noise::new(11, 0);
        let size = [1.0, 1.0, 1.0, 1e-3, 1e3, 1e6, 1e-12, 1e35][case as usize % 8];
        let value = |id: u32| match id.wrapping_mul(31).wrapping_add(case) % 101 {
            0 => f32::NEG_INFINITY,
            1 if case.is_multiple_of(5) => f32::INFINITY,
            _ => 3.0 * size * Noise::new(12, 0).at(case, id),
        };
        (noise, (0..1000).map(value).collect())
    }

    #[test]
    fn a_pass_visits_everyone_who_reaches_the_bar() {
        let mut passed_over = 0;
        for case in 0..2000_u32 {
            let (noise, row) = scene(case);
            let draw = Draw { noise: &noise, position: case };
            let divisor = [1.0, 0.7, 1.3, 1e-6, 1e6, 2e-38][case as usize % 6];
            let score = |id: u32| row[id as usize] / divisor + draw.of(id);
            // Somebody's own score is the hardest bar for every rounding on the way to it.
            let bar = match case % 23 {
                0 => f32::NEG_INFINITY,
                1 => f32::INFINITY,
                _ => score(case % 1000),
            };
            let mut visited = vec![false; row.len()];
            let pass = NoisyPass { draw, scale: 1.0 / divisor, least: f32::NEG_INFINITY };
            pass.visit(&row, 0, bar, |_, id, _| {
                visited[id as usize] = true;
                bar
            });
            for id in 0..row.len() as u32 {
                assert!(
                    visited[id as usize] || score(id) < bar,
                    "case {case}: token {id}, {} of {bar}",
                    score(id)
                );
            }
            passed_over += visited.iter().filter(|&&visited| !visited).count();
        }
        assert!(passed_over > 500_000, "{passed_over} of 2,000,000 are few");
    }

    #[test]
    fn the_top_by_noise_is_what_sorting_gives() {
        for case in 0..400_u32 {
            let (noise, row) = scene(case);
            let (draw, first) = (Draw { noise: &noise, position: case }, 4 * case);
            let scale = [1.0, 0.7, 1e-3][case as usize % 3];
            let rank = |(id, &value): (u32, &f32)| Rank {
                value: draw.of(first + id) + scale * value,
                id: first + id,
            };
            let mut sorted: Vec<Rank> = (0..).zip(&row).map(rank).collect();
            sorted.sort_by(Rank::order);
            for k in [0, 1, 32, 400, 1500] {
                let mut out = Vec::new();
                top_noisy((&row, first), draw, scale, k, &mut out);
                assert_eq!(out, sorted[..k.min(1000)], "case {case}, k = {k}");
            }
        }
    }
}
