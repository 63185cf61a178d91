//! What numbers of flags may be: a flag that is out of bounds is refused by its name, before anything starts.

use std::ops::RangeInclusive;

/// A day: whoever means more than that means none of it.
const SECONDS_MAX: f64 = 86_400.0;

/// Beyond, sums and quotients of such numbers are no times any more that a clock can tell.
const MAGNITUDES: RangeInclusive<f64> = 1e-6..=1e9;

/// A whole number in a range.
pub fn within(range: RangeInclusive<u64>) -> impl Fn(&str) -> Result<usize, String> + Clone {
    move |text| match text.parse::<u64>() {
        Ok(number) if range.contains(&number) => Ok(number as usize),
        _ => Err(format!("wants a whole number from {} to {}", range.start(), range.end())),
    }
}

/// # Errors
/// When it is no whole number of 64 bits.
pub fn seed(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| format!("wants a whole number from 0 to {}", u64::MAX))
}

/// A number whose limits the cluster knows, which says them with the name of the field.
///
/// # Errors
/// When it is no number.
pub fn number(text: &str) -> Result<f32, String> {
    text.parse().map_err(|_| "wants a number, such as 0.7".to_owned())
}

/// # Errors
/// When it is no number of seconds that anybody could mean.
pub fn seconds(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if (0.0..=SECONDS_MAX).contains(&seconds) => Ok(seconds),
        _ => Err(format!("wants seconds, from 0 to {SECONDS_MAX}")),
    }
}

/// # Errors
/// When it is no number above 0, or one that nothing is measured in.
pub fn positive(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(number) if MAGNITUDES.contains(&number) => Ok(number),
        _ => Err(format!("wants a number from {} to {}", MAGNITUDES.start(), MAGNITUDES.end())),
    }
}

/// # Errors
/// When it is no part of a whole.
pub fn share(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(number @ 0.0..=1.0) => Ok(number),
        _ => Err("wants a number from 0 to 1".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory as _, Parser as _};

    use crate::args::{Cli, with_negatives};

    #[test]
    fn a_number_out_of_bounds_is_refused_by_the_name_of_its_flag() {
        let base = "base --model m.gguf";
        let cases = [
            (base, "--kv-tokens", "99999999999999"),
            (base, "--kv-tokens", "0"),
            (base, "--step-tokens", "0"),
            (base, "--running-max", "0"),
            (base, "--threads", "0"),
            (base, "--threads", "100000"),
            (base, "--drain-timeout", "1e30"),
            (base, "--drain-timeout", "NaN"),
            ("router", "--requests-max", "0"),
            ("router", "--batches-max", "0"),
            ("generate x", "--timeout", "1e30"),
            ("batch in --output out", "--in-flight", "0"),
            ("simulate", "--workers-max", "0"),
            ("simulate", "--routers", "0"),
            ("simulate", "--rate", "1e-300"),
            ("simulate", "--pod-start", "1e300"),
            ("simulate", "--ttft-p99", "1e300"),
            ("simulate", "--guided", "2"),
            ("simulate", "--acceptance", "2"),
            ("simulate", "--certified", "2"),
            ("simulate", "--goodput", "2"),
            ("simulate", "--spread", "nan"),
            ("simulate", "--requests", "0"),
            ("bench choose", "--vocabulary", "0"),
            ("generate x", "--seed", "-1"),
            ("generate x", "--timeout", "-1"),
            ("generate x", "--top-k", "-1"),
            ("generate x", "--temperature", "hot"),
            ("generate x", "--strength", "1,5"),
            ("bench choose", "--rounds", "-1"),
            ("bench context", "--prompt-tokens", "-1"),
            (base, "--rank", "-1"),
            ("train c.toml --out out", "--threads", "-1"),
        ];
        for (command, flag, number) in cases {
            let words = ["uniarm"].into_iter().chain(command.split(' ')).chain([flag, number]);
            let refused = with_negatives(Cli::command()).try_get_matches_from(words);
            let refused = refused.expect_err(flag).to_string();
            assert!(refused.contains(flag) && refused.contains(number), "{flag} {number}: {refused}");
        }
        // Whoever wants nobody to wait may have that.
        Cli::try_parse_from(["uniarm", "base", "--model", "m.gguf", "--waiting-max", "0"]).unwrap();
    }
}
