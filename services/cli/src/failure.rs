//! How an error is told to a person.

/// The error and its causes in one sentence, each said once: some errors name their cause themselves.
pub fn sentence(error: &anyhow::Error) -> String {
    let mut told = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if told.is_empty() {
            told = cause;
        } else if !told.contains(&cause) {
            told.push_str(": ");
            told.push_str(&cause);
        }
    }
    told
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // a test that panics has failed, and says where

    use anyhow::Context as _;

    use super::*;

    #[derive(Debug)]
    struct NamesItsCause(std::io::Error);

    impl std::fmt::Display for NamesItsCause {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            write!(f, "model.gguf: {}", self.0)
        }
    }

    impl std::error::Error for NamesItsCause {
        fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
            Some(&self.0)
        }
    }

    #[test]
    fn each_cause_is_said_once() {
        let cause = std::io::Error::other("no space left");
        let error = Err::<(), _>(NamesItsCause(cause)).context("cannot load").unwrap_err();
        assert_eq!(sentence(&error), "cannot load: model.gguf: no space left");
        let plain = anyhow::anyhow!("inner").context("outer");
        assert_eq!(sentence(&plain), "outer: inner");
    }
}
