//! What this machine can do at most: the floors that a step is measured against.

use std::{
    thread,
    time::{Duration, Instant},
};

use crate::kernels::{
    buffer::Buffer,
    simd::{F32x16, I32x16, Isa, Kernel, LANES},
};

/// Far beyond every cache, so that reading it is reading memory.
const STREAM_FLOATS: usize = 64 << 20;

/// Independent accumulators: latency times ports of the processors that we know, and few enough that the compiler keeps
/// every one of them in a register. Where a vector is two registers, of which there are half as many, the same number of
/// registers is half as many accumulators.
const CHAINS_WIDE: usize = 10;
const CHAINS_NARROW: usize = 5;

/// Multiply-adds of one measurement for each chain.
const CHAIN_STEPS: usize = 8 << 20;

/// Words of activations that integer products go through, again and again.
const WORDS: usize = 64;

/// Best of so many: a floor is what the machine does undisturbed.
const REPEATS: usize = 5;

/// Bytes per second that `threads` threads read from memory together, in order.
#[must_use]
pub fn stream_bytes_per_second(threads: usize) -> f64 {
    let mut floats = Buffer::zeroed(STREAM_FLOATS);
    floats.fill(1.0); // pages that were never written are all one page of zeros
    let floats: &[f32] = &floats;
    let share = STREAM_FLOATS / threads;
    let seconds = best(|| together(threads, |index| read(&floats[index * share..(index + 1) * share])));
    (share * threads * size_of::<f32>()) as f64 / seconds
}

/// Operations per second of `threads` threads together, a multiply-add of a weight of up to 8 bits with an
/// activation of 16 counting as two: the arithmetic of quantised weights. A chain's step is half of four such products.
#[must_use]
pub fn integer_arithmetic_per_second(threads: usize) -> f64 {
    let seconds = best(|| together(threads, |_| multiply_integers(Isa::best())));
    (threads * chains() * CHAIN_STEPS * LANES * 4) as f64 / seconds
}

/// Floating-point operations per second of `threads` threads together, a multiply-add counting as two.
#[must_use]
pub fn arithmetic_per_second(threads: usize) -> f64 {
    let seconds = best(|| together(threads, |_| multiply_add(Isa::best())));
    (threads * chains() * CHAIN_STEPS * LANES * 2) as f64 / seconds
}

/// Accumulators of the instruction set that this machine has.
fn chains() -> usize {
    if Isa::best().is_wide() { CHAINS_WIDE } else { CHAINS_NARROW }
}

fn best(mut measure: impl FnMut() -> Duration) -> f64 {
    (0..REPEATS).map(|_| measure().as_secs_f64()).fold(f64::INFINITY, f64::min)
}

fn together(threads: usize, work: impl Fn(usize) + Sync) -> Duration {
    let began = Instant::now();
    thread::scope(|scope| {
        for index in 0..threads {
            let work = &work;
            scope.spawn(move || work(index));
        }
    });
    began.elapsed()
}

fn read(floats: &[f32]) {
    struct Read<'a>(&'a [f32]);

    impl Kernel for Read<'_> {
        #[inline(always)]
        fn run<V: F32x16>(self) {
            let mut sums = [V::splat(0.0); 8];
            for chunk in self.0.chunks_exact(8 * LANES) {
                for (lane, sum) in sums.iter_mut().enumerate() {
                    // Safety: the chunk holds eight vectors.
                    *sum = sum.add(unsafe { V::load(chunk.as_ptr().add(lane * LANES)) });
                }
            }
            std::hint::black_box(sums.map(F32x16::sum));
        }
    }

    Isa::best().run(Read(floats));
}

fn multiply_add(isa: Isa) {
    struct MultiplyAdd;

    impl Kernel for MultiplyAdd {
        #[inline(always)]
        fn run<V: F32x16>(self) {
            if V::WIDE { chain::<V, CHAINS_WIDE>() } else { chain::<V, CHAINS_NARROW>() }
        }
    }

    #[inline(always)]
    fn chain<V: F32x16, const CHAINS: usize>() {
        let factor = V::splat(std::hint::black_box(0.999_999));
        let addend = V::splat(std::hint::black_box(1e-6));
        let mut chains = [V::splat(1.0); CHAINS];
        for _ in 0..CHAIN_STEPS {
            for chain in &mut chains {
                *chain = chain.mul_add(factor, addend);
            }
        }
        std::hint::black_box(chains.map(F32x16::sum));
    }

    isa.run(MultiplyAdd);
}

fn multiply_integers(isa: Isa) {
    struct MultiplyIntegers;

    impl Kernel for MultiplyIntegers {
        #[inline(always)]
        fn run<V: F32x16>(self) {
            if V::WIDE { chain::<V, CHAINS_WIDE>() } else { chain::<V, CHAINS_NARROW>() }
        }
    }

    #[inline(always)]
    fn chain<V: F32x16, const CHAINS: usize>() {
        let bytes = std::hint::black_box([3u8; 4 * LANES]);
        // Activations 258 and -258: no sum grows, and none overflows. A word for each product, or products that do not change
        // would be computed once.
        let words = std::hint::black_box([0xfefe_0102_u32.cast_signed(); WORDS + CHAINS_WIDE]);
        // Safety: 64 bytes.
        let weights = unsafe { V::Integers::load_weights(bytes.as_ptr()) };
        let mut chains = [V::Integers::splat(0); CHAINS];
        for step in 0..CHAIN_STEPS {
            for (chain, word) in chains.iter_mut().zip(&words[step % WORDS..]) {
                *chain = chain.dot::<0>(weights, *word);
            }
        }
        std::hint::black_box(chains.map(I32x16::sum));
    }

    isa.run(MultiplyIntegers);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_timed_runs_on_every_instruction_set() {
        for isa in Isa::available() {
            multiply_add(isa);
            multiply_integers(isa);
        }
    }
}
