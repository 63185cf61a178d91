//! Random numbers for what may differ from run to run (waits, turns, ids), and never for a token.

use std::sync::{Arc, Mutex, PoisonError};

use rand::{
    Rng as _, RngCore, SeedableRng as _,
    distr::{Distribution, StandardUniform},
    rngs::StdRng,
};

/// The operating system's randomness, or a seed that makes a simulated run repeatable. Clones share it.
#[derive(Clone, Default)]
pub struct Dice {
    seeded: Option<Arc<Mutex<StdRng>>>,
}

// === impl Dice ===

impl Dice {
    #[must_use]
    pub fn seeded(seed: u64) -> Self {
        Self { seeded: Some(Arc::new(Mutex::new(StdRng::seed_from_u64(seed)))) }
    }

    pub fn roll<T>(&self) -> T
    where
        StandardUniform: Distribution<T>,
    {
        self.with(|random| random.random())
    }

    /// A number below `count`; 0 where there is none.
    pub fn below(&self, count: usize) -> usize {
        self.with(|random| random.random_range(0..count.max(1)))
    }

    fn with<T>(&self, draw: impl FnOnce(&mut dyn RngCore) -> T) -> T {
        match &self.seeded {
            None => draw(&mut rand::rng()),
            Some(seeded) => draw(&mut *seeded.lock().unwrap_or_else(PoisonError::into_inner)),
        }
    }
}
