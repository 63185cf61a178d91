//! Text from the bytes of tokens: whole characters, and nothing of a stop string.
//!
//! What a stream releases does not depend on how the bytes were cut into tokens, except in when: the answer
//! ends where the first stop string is completed, byte by byte; of several completed by the same byte, the
//! longest counts. Text that may still turn out to be the beginning of a stop string is held back, and no
//! more than that.

/// Turns the bytes of one answer into text.
#[derive(Clone, Debug)]
pub struct TextStream {
    stops: Vec<Stop>,
    /// Bytes of a character that is not complete.
    bytes: Vec<u8>,
    /// Text that is not released: it may be the beginning of a stop string.
    held: String,
    stopped: bool,
}

/// What became certain with a token.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TextDelta {
    pub text: String,
    /// Index of the stop string that ended the answer; `text` ends before it.
    pub stop: Option<usize>,
}

/// A stop string and how much of it the text ends with (Knuth, Morris and Pratt).
#[derive(Clone, Debug)]
struct Stop {
    pattern: Vec<u8>,
    /// For each length of a matched prefix, the length of its longest proper border.
    borders: Vec<usize>,
    matched: usize,
}

impl TextStream {
    /// Empty stop strings never match.
    pub fn new(stops: Vec<String>) -> Self {
        let stops = stops.into_iter().map(|stop| Stop::new(stop.into_bytes())).collect();
        Self { stops, bytes: Vec::new(), held: String::new(), stopped: false }
    }

    /// Appends a token's bytes and returns the text that is certain now. After a stop, nothing follows.
    pub fn push(&mut self, bytes: &[u8]) -> TextDelta {
        if self.stopped {
            return TextDelta::default();
        }
        self.bytes.extend_from_slice(bytes);
        let decoded = self.decode();
        self.advance(&decoded)
    }

    /// The rest of the text: what was held back, and an unfinished character as U+FFFD.
    pub fn finish(&mut self) -> String {
        if self.stopped {
            return String::new();
        }
        self.stopped = true;
        let mut text = std::mem::take(&mut self.held);
        text.push_str(&String::from_utf8_lossy(&std::mem::take(&mut self.bytes)));
        text
    }

    /// Takes the complete characters from `bytes`; what can never become one is U+FFFD, as in
    /// [`String::from_utf8_lossy`].
    fn decode(&mut self) -> String {
        let mut text = String::new();
        loop {
            match std::str::from_utf8(&self.bytes) {
                Ok(valid) => {
                    text.push_str(valid);
                    self.bytes.clear();
                    return text;
                }
                Err(error) => {
                    let valid = error.valid_up_to();
                    text.push_str(std::str::from_utf8(&self.bytes[..valid]).expect("valid up to here"));
                    let Some(invalid) = error.error_len() else {
                        self.bytes.drain(..valid);
                        return text;
                    };
                    text.push(char::REPLACEMENT_CHARACTER);
                    self.bytes.drain(..valid + invalid);
                }
            }
        }
    }

    fn advance(&mut self, decoded: &str) -> TextDelta {
        let start = self.held.len();
        self.held.push_str(decoded);
        for end in start + 1..=self.held.len() {
            let byte = self.held.as_bytes()[end - 1];
            let mut hit: Option<(usize, usize)> = None; // (length, index)
            for (index, stop) in self.stops.iter_mut().enumerate() {
                if stop.push(byte) && hit.is_none_or(|(length, _)| stop.pattern.len() > length) {
                    hit = Some((stop.pattern.len(), index));
                }
            }
            if let Some((length, index)) = hit {
                self.stopped = true;
                let mut text = std::mem::take(&mut self.held);
                text.truncate(end - length);
                return TextDelta { text, stop: Some(index) };
            }
        }
        // Stop strings are whole characters and begin in text of whole characters: no character is cut.
        let hold = self.stops.iter().map(|stop| stop.matched).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - hold);
        TextDelta { text: std::mem::replace(&mut self.held, rest), stop: None }
    }
}

impl Stop {
    fn new(pattern: Vec<u8>) -> Self {
        let mut borders = vec![0; pattern.len() + 1];
        let mut border = 0;
        for index in 1..pattern.len() {
            while border > 0 && pattern[index] != pattern[border] {
                border = borders[border];
            }
            border += usize::from(pattern[index] == pattern[border]);
            borders[index + 1] = border;
        }
        Self { pattern, borders, matched: 0 }
    }

    /// Appends a byte of the text; true if the text now ends with the whole pattern.
    fn push(&mut self, byte: u8) -> bool {
        if self.pattern.is_empty() {
            return false;
        }
        while self.matched > 0 && self.pattern[self.matched] != byte {
            self.matched = self.borders[self.matched];
        }
        self.matched += usize::from(self.pattern[self.matched] == byte);
        self.matched == self.pattern.len()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_character_split_over_tokens_is_sent_once_and_whole() {
        let mut stream = TextStream::new(vec![]);
        let texts: Vec<String> = "a\u{1f600}é".bytes().map(|byte| stream.push(&[byte]).text).collect();
        assert_eq!(texts, ["a", "", "", "", "\u{1f600}", "", "é"]);
        assert_eq!(stream.finish(), "");
    }

    #[test]
    fn text_that_may_become_a_stop_is_held_back_and_no_more() {
        let mut stream = TextStream::new(vec!["\n\nUser:".into(), "###".into()]);
        assert_eq!(stream.push(b"Hi.\n").text, "Hi.");
        assert_eq!(stream.push(b"\n\nUs").text, "\n");
        assert_eq!(stream.push(b"e ##").text, "\n\nUse ");
        assert_eq!(stream.push(b"#never").stop, Some(1));
        assert_eq!(stream.push(b"more"), TextDelta::default());
        assert_eq!(stream.finish(), "");
    }

    #[test]
    fn an_answer_that_ends_early_gives_back_what_was_held() {
        let mut stream = TextStream::new(vec!["###".into(), String::new()]);
        assert_eq!(stream.push(b"a##\xf0\x9f"), TextDelta { text: "a".into(), stop: None });
        assert_eq!(stream.finish(), "##\u{fffd}");
    }

    proptest! {
        #[test]
        fn text_and_stop_do_not_depend_on_how_bytes_are_cut_into_tokens(
            bytes in proptest::collection::vec(prop_oneof![Just(b'a'), Just(b'b'), Just(0xc3), Just(0xa9), Just(0xff)], 0..40),
            cuts in proptest::collection::vec(1_usize..6, 40),
            stops in proptest::collection::vec("[abé]{1,4}", 0..3),
        ) {
            let whole = String::from_utf8_lossy(&bytes).into_owned();
            // The first end at which any stop is a suffix; the longest of those.
            let mut expected = (whole.clone(), None);
            for end in (0..=whole.len()).filter(|&end| whole.is_char_boundary(end)) {
                let ending = |index: &usize| whole[..end].ends_with(&stops[*index]);
                let longest = (0..stops.len()).rev().filter(ending).max_by_key(|&index| stops[index].len());
                if let Some(index) = longest {
                    expected = (whole[..end - stops[index].len()].to_string(), Some(index));
                    break;
                }
            }

            let mut stream = TextStream::new(stops.clone());
            let (mut text, mut stop, mut rest) = (String::new(), None, &bytes[..]);
            for cut in cuts {
                let (token, tail) = rest.split_at(cut.min(rest.len()));
                let delta = stream.push(token);
                text.push_str(&delta.text);
                stop = stop.or(delta.stop);
                rest = tail;
            }
            prop_assume!(rest.is_empty());
            text.push_str(&stream.finish());
            prop_assert_eq!((text, stop), expected);
        }
    }
}
