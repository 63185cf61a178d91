//! A step in words, from the leader to all followers: what each of them needs to lay out the same rows.
//!
//! Words of 32 bits travel as the floats of the same bits. A first message of fixed length says how many there are and holds
//! as many as fit, which is all of them while few sequences are decoded; a second one has the rest.

use uniarm_collective::Collective;

use super::FINGERPRINT_WORDS;
use crate::adapter::{AdapterContents, CONFIG_BYTES_MAX, TENSOR_BYTES_MAX};
use crate::error::ModelError;
use crate::forward::Row;
use crate::likeliest::{Likeliest, NoiseAt};

/// Words of the first message; the first one counts all words of the step.
const HEAD_WORDS: usize = 256;

/// Words of a row before its lists: tokens, start, logits_from, blocks, whether it has an adapter, weights of its preference,
/// and how many tokens are wanted of each position in place of its logits: 0 for these.
const ROW_WORDS: usize = 7;

/// Words of what ranks those tokens: scale, whether there is noise, both halves of its seed, choice, position.
const RANKING_WORDS: usize = 6;

/// A row that has no tokens is another order, of one of these kinds.
const AGAIN: u32 = 0;
const ADAPTER: u32 = 1;
const FORGET: u32 = 2;

/// Words of an adapter's files that travel at a time.
const PIECE_WORDS: usize = 1 << 20;

/// Workspace of one rank.
#[derive(Default)]
pub(super) struct Order {
    words: Vec<u32>,
}

/// A row as a follower hears of it.
#[derive(Debug, PartialEq)]
pub(super) struct Told<'a> {
    pub tokens: &'a [u32],
    pub start: usize,
    pub logits_from: usize,
    pub blocks: &'a [u32],
    /// Fingerprint and preference.
    pub adapter: Option<([u8; 32], Vec<f32>)>,
    pub likeliest: Option<Likeliest>,
}

/// What a follower is told.
#[derive(Debug, PartialEq)]
pub(super) enum Heard<'a> {
    /// To compute these; none are a sign of life.
    Rows(Vec<Told<'a>>),
    /// To hand over the rows behind the lists of these numbers.
    Again(Vec<u64>),
    /// To keep an adapter: rows under it will come.
    Adapter(AdapterContents),
    /// To let the adapter of this fingerprint go.
    Forget([u8; 32]),
}

impl Order {
    /// Tells the followers to compute `rows`, of which `wanted` are listed (one entry for each row, or none at all); no rows
    /// are a sign of life.
    pub fn send(
        &mut self,
        group: &mut dyn Collective,
        rows: &[Row<'_>],
        wanted: &[Option<Likeliest>],
    ) -> Result<(), ModelError> {
        self.words.clear();
        self.words.push(0);
        for (index, row) in rows.iter().enumerate() {
            write(&mut self.words, row, wanted.get(index).and_then(Option::as_ref));
        }
        self.tell(group)
    }

    /// Tells the followers to hand over the rows behind the lists of these numbers.
    pub fn send_again(&mut self, group: &mut dyn Collective, numbers: &[u64]) -> Result<(), ModelError> {
        self.words.clear();
        self.words.extend([0, 0, AGAIN]);
        self.words.extend(numbers.iter().flat_map(|number| halves(*number)));
        self.tell(group)
    }

    /// Gives the followers an adapter: its configuration, then its tensors, in pieces.
    pub fn send_adapter(
        &mut self,
        group: &mut dyn Collective,
        contents: &AdapterContents,
    ) -> Result<(), ModelError> {
        let AdapterContents { text, tensors } = contents;
        self.words.clear();
        self.words.extend([0, 0, ADAPTER]);
        self.words.extend([text.len(), tensors.len()].iter().flat_map(|bytes| halves(*bytes as u64)));
        self.tell(group)?;
        for bytes in [text.as_bytes(), tensors] {
            for piece in bytes.chunks(PIECE_WORDS * size_of::<u32>()) {
                self.words.resize(piece.len().div_ceil(size_of::<u32>()), 0);
                bytemuck::cast_slice_mut(&mut self.words)[..piece.len()].copy_from_slice(piece);
                group.broadcast(0, bytemuck::cast_slice_mut(&mut self.words))?;
            }
        }
        Ok(())
    }

    /// Tells the followers that no row will be under this adapter any more.
    pub fn send_forget(
        &mut self,
        group: &mut dyn Collective,
        fingerprint: &[u8; 32],
    ) -> Result<(), ModelError> {
        self.words.clear();
        self.words.extend([0, 0, FORGET]);
        self.words.extend(words_of(fingerprint));
        self.tell(group)
    }

    fn tell(&mut self, group: &mut dyn Collective) -> Result<(), ModelError> {
        self.words[0] = self.words.len() as u32 - 1;
        self.words.resize(self.words.len().max(HEAD_WORDS), 0);
        let (head, rest) = self.words.split_at_mut(HEAD_WORDS);
        group.broadcast(0, bytemuck::cast_slice_mut(head))?;
        if !rest.is_empty() {
            group.broadcast(0, bytemuck::cast_slice_mut(rest))?;
        }
        Ok(())
    }

    /// Waits for the leader's next word.
    pub fn receive(&mut self, group: &mut dyn Collective) -> Result<Heard<'_>, ModelError> {
        self.words.resize(HEAD_WORDS, 0);
        group.broadcast(0, bytemuck::cast_slice_mut(&mut self.words))?;
        let count = 1 + self.words[0] as usize;
        if count > HEAD_WORDS {
            self.words.resize(count, 0);
            group.broadcast(0, bytemuck::cast_slice_mut(&mut self.words[HEAD_WORDS..]))?;
        }
        let unknown = || ModelError::Invalid {
            field: "order",
            reason: "the leader's words are no order: it is another version".to_owned(),
        };
        if let [0, kind, rest @ ..] = &self.words[1..count] {
            return match (*kind, rest) {
                (AGAIN, numbers) => Ok(Heard::Again(numbers.as_chunks().0.iter().map(whole).collect())),
                (ADAPTER, &[a, b, c, d]) => self.receive_adapter(group, [whole(&[a, b]), whole(&[c, d])]),
                (FORGET, words) => fingerprint_of(words).map(Heard::Forget).ok_or_else(unknown),
                _ => Err(unknown()),
            };
        }
        let mut rest = &self.words[1..count];
        let mut rows = Vec::new();
        while !rest.is_empty() {
            rows.push(read(&mut rest).ok_or_else(unknown)?);
        }
        Ok(Heard::Rows(rows))
    }

    fn receive_adapter(
        &mut self,
        group: &mut dyn Collective,
        [text_bytes, tensor_bytes]: [u64; 2],
    ) -> Result<Heard<'_>, ModelError> {
        if text_bytes > CONFIG_BYTES_MAX || tensor_bytes > TENSOR_BYTES_MAX {
            let reason = format!("files of {text_bytes} and {tensor_bytes} bytes are too large");
            return Err(ModelError::Invalid { field: "adapter", reason });
        }
        let mut receive = |bytes: u64| -> Result<Vec<u8>, ModelError> {
            let bytes = bytes as usize;
            let mut contents = Vec::with_capacity(bytes);
            while contents.len() < bytes {
                let piece = (bytes - contents.len()).min(PIECE_WORDS * size_of::<u32>());
                self.words.resize(piece.div_ceil(size_of::<u32>()), 0);
                group.broadcast(0, bytemuck::cast_slice_mut(&mut self.words))?;
                contents.extend_from_slice(&bytemuck::cast_slice(&self.words)[..piece]);
            }
            Ok(contents)
        };
        let text = String::from_utf8(receive(text_bytes)?);
        let tensors = receive(tensor_bytes)?;
        let text = text.map_err(|_| ModelError::Invalid {
            field: "adapter",
            reason: "its configuration is not UTF-8".to_owned(),
        })?;
        Ok(Heard::Adapter(AdapterContents { text, tensors }))
    }
}

fn halves(number: u64) -> [u32; 2] {
    [number as u32, (number >> 32) as u32]
}

fn whole(&[low, high]: &[u32; 2]) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

fn words_of(fingerprint: &[u8; 32]) -> impl Iterator<Item = u32> {
    fingerprint.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word))
}

/// `None` for another number of words.
fn fingerprint_of(words: &[u32]) -> Option<[u8; 32]> {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    bytes.try_into().ok()
}

fn write(words: &mut Vec<u32>, row: &Row<'_>, likeliest: Option<&Likeliest>) {
    let preference = row.adapter.map_or(&[][..], |adapter| adapter.preference());
    let counts = [
        row.tokens.len(),
        row.start,
        row.logits_from,
        row.blocks.len(),
        usize::from(row.adapter.is_some()),
        preference.len(),
        likeliest.map_or(0, |list| list.count),
    ];
    words.extend(counts.map(|count| count as u32));
    words.extend(row.tokens.iter().chain(row.blocks));
    if let Some(conditioned) = row.adapter {
        words.extend(words_of(&conditioned.adapter().fingerprint()));
        words.extend(preference.iter().map(|weight| weight.to_bits()));
    }
    if let Some(Likeliest { scale, noise, .. }) = likeliest {
        let NoiseAt { seed, choice, position } = noise.unwrap_or(NoiseAt { seed: 0, choice: 0, position: 0 });
        let (noisy, [low, high]) = (u32::from(noise.is_some()), halves(seed));
        words.extend([scale.to_bits(), noisy, low, high, choice, position]);
    }
}

/// `None` for what is no row.
fn read<'a>(rest: &mut &'a [u32]) -> Option<Told<'a>> {
    let mut take = |count: usize| rest.split_off(..count);
    let &[tokens, start, logits_from, blocks, has_adapter, weights, count] = take(ROW_WORDS)? else {
        return None;
    };
    let (tokens, blocks) = (take(tokens as usize)?, take(blocks as usize)?);
    let adapter = if has_adapter == 1 {
        let fingerprint = fingerprint_of(take(FINGERPRINT_WORDS)?)?;
        let preference = take(weights as usize)?.iter().map(|bits| f32::from_bits(*bits)).collect();
        Some((fingerprint, preference))
    } else {
        None
    };
    let likeliest = match count as usize {
        0 => None,
        count => {
            let &[scale, noisy, low, high, choice, position] = take(RANKING_WORDS)? else { return None };
            let noise = (noisy == 1).then_some(NoiseAt { seed: whole(&[low, high]), choice, position });
            Some(Likeliest { count, scale: f32::from_bits(scale), noise })
        }
    };
    Some(Told {
        tokens,
        start: start as usize,
        logits_from: logits_from as usize,
        blocks,
        adapter,
        likeliest,
    })
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::Duration;

    use uniarm_collective::{Group, Local, Payload};

    use super::*;

    #[test]
    fn followers_hear_the_rows_that_the_leader_tells() {
        let group = Group { size: 2, epoch: 1, payload: Payload::F32, timeout: Duration::from_secs(60) };
        let [mut leader, mut follower] =
            Local::group(group).expect("two ranks").try_into().ok().expect("two");
        let long: Vec<u32> = (0..1000).collect();
        let few =
            [Row { tokens: &[7, u32::MAX >> 9], start: 14, blocks: &[3, 9], logits_from: 1, adapter: None }];
        let many = [few[0], Row { tokens: &long, start: 0, logits_from: 1000, ..few[0] }];
        let noise = NoiseAt { seed: u64::MAX - 5, choice: 3, position: 1 << 31 };
        let wanted = [
            Some(Likeliest { count: 128, scale: 0.7, noise: Some(noise) }),
            Some(Likeliest { count: 1, scale: 1.0, noise: None }),
        ];
        let again: Vec<u64> = (5..500).map(|number| number << 29).collect();
        // Of less than a word, and of more than one piece.
        let contents = [
            AdapterContents { text: "{}".to_owned(), tensors: vec![1, 2, 3] },
            AdapterContents {
                text: " ".repeat(4097),
                tensors: (0..4 * PIECE_WORDS + 5).map(|i| (i * 7) as u8).collect(),
            },
        ];
        let told = |rows: &[Row<'_>], heard: Heard<'_>| {
            let Heard::Rows(heard) = heard else { panic!("{heard:?}") };
            assert_eq!(heard.len(), rows.len());
            for ((heard, row), wanted) in heard.iter().zip(rows).zip(wanted) {
                assert_eq!(heard.likeliest, wanted);
                assert_eq!((heard.tokens, heard.blocks), (row.tokens, row.blocks));
                assert_eq!((heard.start, heard.logits_from), (row.start, row.logits_from));
            }
        };
        thread::scope(|scope| {
            scope.spawn(|| {
                let mut order = Order::default();
                for rows in [&few[..], &[], &many] {
                    order.send(&mut leader, rows, &wanted).expect("a follower");
                }
                for numbers in [&again[..1], &again] {
                    order.send_again(&mut leader, numbers).expect("a follower");
                }
                for contents in &contents {
                    order.send_adapter(&mut leader, contents).expect("a follower");
                }
                order.send_forget(&mut leader, &[7; 32]).expect("a follower");
            });
            let mut order = Order::default();
            for rows in [&few[..], &[], &many] {
                told(rows, order.receive(&mut follower).expect("a leader"));
            }
            for numbers in [&again[..1], &again] {
                let heard = order.receive(&mut follower).expect("a leader");
                assert_eq!(heard, Heard::Again(numbers.to_vec()));
            }
            for contents in &contents {
                let heard = order.receive(&mut follower).expect("a leader");
                let Heard::Adapter(heard) = heard else { panic!("another order") };
                assert!(heard == *contents, "{} bytes of tensors", contents.tensors.len());
            }
            assert_eq!(order.receive(&mut follower).expect("a leader"), Heard::Forget([7; 32]));
        });
    }

    #[test]
    fn words_that_are_no_rows_are_refused() {
        let cut = [
            &[1, 0, 0, 0, 0, 0][..],
            &[2, 0, 0, 0, 0, 0, 0, 5],
            &[1, 0, 0, 0, 1, 0, 0, 5, 6],
            &[1, 0, 0, 0, 0, 0, 9, 5, 1, 0, 0],
        ];
        for words in cut {
            let mut rest = words;
            assert_eq!(read(&mut rest), None);
        }
    }
}
