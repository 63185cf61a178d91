//! Chance as a function: whatever is drawn depends on the seed, the purpose and two numbers, and on no state.
//!
//! With a generator that holds state, one worker more would shift every draw after it, and two pool sizes could not be
//! compared on the same luck.

use uniarm_decode::noise::philox4x32_10;

/// What is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    ArrivalTime,
    ArrivalKind,
    Lengths,
    Placement,
    Certificate,
    Acceptance,
    Token,
}

/// The dice of one simulation.
#[derive(Clone, Copy, Debug)]
pub struct Dice {
    key: [u32; 2],
}

// === impl Dice ===

impl Dice {
    pub fn new(seed: u64) -> Self {
        Self { key: [seed as u32, (seed >> 32) as u32] }
    }

    /// Four random words.
    pub fn words(self, purpose: Purpose, index: u64, position: u32) -> [u32; 4] {
        philox4x32_10([position, index as u32, (index >> 32) as u32, purpose as u32], self.key)
    }

    /// Four numbers, uniform on (0, 1).
    pub fn units(self, purpose: Purpose, index: u64, position: u32) -> [f64; 4] {
        self.words(purpose, index, position).map(|word| (f64::from(word) + 0.5) / 2f64.powi(32))
    }

    /// Whether something of this probability happens.
    pub fn happens(self, probability: f64, purpose: Purpose, index: u64, position: u32) -> bool {
        self.units(purpose, index, position)[0] < probability
    }
}
