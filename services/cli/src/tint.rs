//! Text coloured by what guidance did to each of its tokens.

use uniarm_proto::pb;

/// From here on a token is one that guidance made likelier, or less likely: twice.
const LEANING: f32 = std::f32::consts::LN_2;

/// And from here on much: ten times.
const STRONG: f32 = std::f32::consts::LN_10;

const RESET: &str = "\x1b[0m";

/// What the colours mean, for a footer.
pub const LEGEND: &str = "likelier by guidance: \x1b[38;5;114mtwice\x1b[0m, \x1b[1;38;5;34mten times\x1b[0m; \
                          less likely: \x1b[38;5;216mhalf\x1b[0m, \x1b[1;38;5;203ma tenth\x1b[0m; \x1b[7munguided\x1b[0m";

/// The text of an event in colours. Needs details with at least one alternative.
pub fn tinted(tokens: &pb::Tokens) -> String {
    let chosen: Option<Vec<&pb::Alternative>> =
        tokens.ids.iter().zip(&tokens.details).map(|(id, detail)| own(*id, detail)).collect();
    let Some(chosen) = chosen else { return tokens.text.clone() };
    let pieces: String = chosen.iter().map(|one| one.text.as_str()).collect();
    let is_unguided = |index: usize| tokens.unguided.contains(&(index as u32));
    if pieces == tokens.text && !chosen.is_empty() {
        let piece =
            |(index, one): (usize, &&pb::Alternative)| painted(&one.text, gain(one), is_unguided(index));
        return chosen.iter().enumerate().map(piece).collect();
    }
    // Characters that span tokens, and text that was held back for a stop string, are of all of them.
    let mean = chosen.iter().map(|one| gain(one)).sum::<f32>() / chosen.len().max(1) as f32;
    painted(&tokens.text, mean, !tokens.unguided.is_empty())
}

/// The chosen token among its alternatives.
fn own(id: u32, detail: &pb::TokenDetail) -> Option<&pb::Alternative> {
    detail.alternatives.iter().find(|alternative| alternative.id == id)
}

/// How much likelier guidance made it, as a logarithm.
fn gain(alternative: &pb::Alternative) -> f32 {
    alternative.guided_logprob - alternative.base_logprob
}

fn painted(text: &str, gain: f32, is_unguided: bool) -> String {
    let colour = match gain {
        _ if is_unguided => "\x1b[7m",
        gain if gain >= STRONG => "\x1b[1;38;5;34m",
        gain if gain >= LEANING => "\x1b[38;5;114m",
        gain if gain <= -STRONG => "\x1b[1;38;5;203m",
        gain if gain <= -LEANING => "\x1b[38;5;216m",
        _ => return text.to_owned(),
    };
    format!("{colour}{text}{RESET}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn detail(id: u32, text: &str, gain: f32) -> pb::TokenDetail {
        let own = pb::Alternative {
            id,
            text: text.into(),
            guided_logprob: gain - 3.0,
            base_logprob: -3.0,
            ..Default::default()
        };
        pb::TokenDetail { alternatives: vec![pb::Alternative::default(), own], ..Default::default() }
    }

    #[test]
    fn each_token_has_the_colour_of_what_guidance_did() {
        let details = vec![
            detail(1, "The", 0.1),
            detail(2, " sea", 1.0),
            detail(3, " shines", 5.0),
            detail(4, "!", -1.0),
        ];
        let mut tokens = pb::Tokens {
            ids: vec![1, 2, 3, 4],
            text: "The sea shines!".into(),
            details,
            ..Default::default()
        };
        assert_eq!(
            tinted(&tokens),
            "The\x1b[38;5;114m sea\x1b[0m\x1b[1;38;5;34m shines\x1b[0m\x1b[38;5;216m!\x1b[0m"
        );
        tokens.text = "The sea shines".into();
        assert_eq!(tinted(&tokens), "\x1b[38;5;114mThe sea shines\x1b[0m", "held back text has one colour");
        tokens.details.clear();
        tokens.ids.clear();
        tokens.text.clear();
        assert_eq!(tinted(&tokens), "");
    }
}
