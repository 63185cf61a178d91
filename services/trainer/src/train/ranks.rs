//! This process among the workers of a run: its share of the pairs, and sums over all of them.

use std::ops::Range;

use uniarm_collective::Collective;

/// One rank; alone, it is all of them.
pub struct Ranks(Option<Box<dyn Collective>>);

// === impl Ranks ===

impl Ranks {
    pub fn alone() -> Self {
        Self(None)
    }

    pub fn of(group: Box<dyn Collective>) -> Self {
        Self((group.size() > 1).then_some(group))
    }

    pub fn rank(&self) -> usize {
        self.0.as_ref().map_or(0, |group| group.rank())
    }

    pub fn size(&self) -> usize {
        self.0.as_ref().map_or(1, |group| group.size())
    }

    /// The rank that writes.
    pub fn is_first(&self) -> bool {
        self.rank() == 0
    }

    /// This rank's range of `count` things: all ranks together cover each once.
    pub fn share(&self, count: usize) -> Range<usize> {
        count * self.rank() / self.size()..count * (self.rank() + 1) / self.size()
    }

    /// Sums of gradients, in the order of ranks: the same bits everywhere.
    ///
    /// # Errors
    /// A peer that is lost.
    pub fn sum_gradient(&mut self, values: &mut [f32]) -> anyhow::Result<()> {
        if let Some(group) = &mut self.0 {
            group.all_reduce_sum(values)?;
        }
        Ok(())
    }

    /// Sums of a few numbers. Alone they keep their 64 bits.
    ///
    /// # Errors
    /// A peer that is lost.
    pub fn sum(&mut self, values: &mut [f64]) -> anyhow::Result<()> {
        let Some(group) = &mut self.0 else { return Ok(()) };
        let mut narrow: Vec<f32> = values.iter().map(|value| *value as f32).collect();
        group.all_reduce_sum(&mut narrow)?;
        values.iter_mut().zip(narrow).for_each(|(value, sum)| *value = f64::from(sum));
        Ok(())
    }

    /// Every rank gets the bytes of the first; the others' do not matter.
    ///
    /// # Errors
    /// A peer that is lost.
    pub fn from_first(&mut self, bytes: Vec<u8>) -> anyhow::Result<Vec<u8>> {
        let Some(group) = &mut self.0 else { return Ok(bytes) };
        // Words of four bytes travel as the floats of the same bits; their count as two halves, exact in a float.
        let mut length = [(bytes.len() >> 16) as f32, (bytes.len() & 0xffff) as f32];
        group.broadcast(0, &mut length)?;
        let length = ((length[0] as usize) << 16) + length[1] as usize;
        let mut padded = bytes;
        padded.resize(length.next_multiple_of(4), 0);
        let word = |word: &[u8]| f32::from_bits(u32::from_le_bytes(word.try_into().expect("chunks of four")));
        let mut words: Vec<f32> = padded.chunks_exact(4).map(word).collect();
        group.broadcast(0, &mut words)?;
        let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_bits().to_le_bytes()).collect();
        bytes.truncate(length);
        Ok(bytes)
    }
}
