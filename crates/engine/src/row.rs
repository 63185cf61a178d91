//! Rows of logits as a step has written them: side by side, and copied only for those who still need theirs when the
//! next step is computed.

use std::{
    fmt,
    ops::{Deref, Range},
    sync::Arc,
};

/// Logits of one position, (vocabulary). They lie among those of the other positions of their step, in memory that the
/// next step writes to again; a holder who needs them for longer has them copied before ([`LogitsRow::keep`]). One that
/// does not costs the executor memory, and is never wrong.
#[derive(Clone)]
pub struct LogitsRow {
    /// Rows of a step, or this one alone.
    rows: Arc<Vec<f32>>,
    range: Range<usize>,
}

/// The rows of the latest step.
#[derive(Default)]
pub(crate) struct StepRows(Arc<Vec<f32>>);

// === impl LogitsRow ===

impl LogitsRow {
    /// Lets go of the other rows of its step.
    pub fn keep(&mut self) {
        if self.range.len() < self.rows.len() {
            *self = self.to_vec().into();
        }
    }
}

impl From<Vec<f32>> for LogitsRow {
    fn from(row: Vec<f32>) -> Self {
        Self { range: 0..row.len(), rows: Arc::new(row) }
    }
}

impl Deref for LogitsRow {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.rows[self.range.clone()]
    }
}

impl fmt::Debug for LogitsRow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LogitsRow({} logits)", self.len())
    }
}

// === impl StepRows ===

impl StepRows {
    /// Memory for the next step's: that of the latest one, unless somebody holds a row of it.
    pub fn writable(&mut self) -> &mut Vec<f32> {
        if Arc::get_mut(&mut self.0).is_none() {
            self.0 = Arc::default();
        }
        Arc::get_mut(&mut self.0).expect("it is held here alone")
    }

    /// In order, `length` logits each.
    pub fn iter(&self, length: usize) -> impl Iterator<Item = LogitsRow> {
        let row = move |index: usize| index * length..(index + 1) * length;
        (0..self.0.len() / length)
            .map(move |index| LogitsRow { rows: Arc::clone(&self.0), range: row(index) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(rows: &mut StepRows, first: f32) -> Vec<LogitsRow> {
        let memory = rows.writable();
        memory.clear();
        memory.extend((0..6).map(|index| first + index as f32));
        rows.iter(3).collect()
    }

    #[test]
    fn a_row_that_is_held_stays_what_it_was_and_memory_of_others_is_used_again() {
        let mut rows = StepRows::default();
        let first = step(&mut rows, 0.0);
        assert_eq!(
            first.iter().map(|row| row.to_vec()).collect::<Vec<_>>(),
            [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
        );
        let memory = first[0].as_ptr();

        // Nobody kept them: the step after this one goes elsewhere.
        let second = step(&mut rows, 10.0);
        assert_ne!(second[0].as_ptr(), memory);
        assert_eq!((first[1][2], second[1][2]), (5.0, 15.0));
        drop(first);

        let memory = second[0].as_ptr();
        let mut kept = second[1].clone();
        kept.keep();
        drop(second);
        let third = step(&mut rows, 20.0);
        assert_eq!(third[0].as_ptr(), memory);
        assert_eq!((&kept[..], third[1][0]), (&[13.0, 14.0, 15.0][..], 23.0));

        let own = kept.as_ptr();
        kept.keep();
        assert_eq!(kept.as_ptr(), own, "it is alone already");
    }
}
