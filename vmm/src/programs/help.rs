//! What `--help` prints: a text, with the keys of each part of a VM from where they are read.

use api::PARTS;

/// Columns of a terminal.
const WIDTH: usize = 80;

/// All of the help.
pub(crate) fn text() -> String {
    let mut text = include_str!("help.txt").to_owned();
    for (option, usage) in PARTS {
        let line = format!("  --{option} ");
        let place = format!("{line}{{}}");
        text = text.replace(&place, &wrapped(&line, &usage.concat()));
    }
    text
}

/// `line` with `usage` behind it, in lines that begin below its first word. They are broken before
/// what may be left out, and between what can be chosen.
fn wrapped(line: &str, usage: &str) -> String {
    let indent = " ".repeat(line.len());
    let (mut text, mut line) = (String::new(), line.to_owned());
    for word in words(usage) {
        if line.len() + word.len() > WIDTH && line.len() > indent.len() {
            text.push_str(&line);
            text.push('\n');
            line.clone_from(&indent);
        }
        line.push_str(word);
    }
    text + &line
}

fn words(usage: &str) -> impl Iterator<Item = &str> {
    let breaks = usage.match_indices("[,").chain(usage.match_indices("|tag"));
    let mut places: Vec<usize> = breaks.map(|(place, _)| place).collect();
    places.push(usage.len());
    places.sort_unstable();
    let mut start = 0;
    places.into_iter().map(move |place| {
        let word = &usage[start..place];
        start = place;
        word
    })
}

#[cfg(test)]
mod tests {
    use api::{DiskConfig, NetConfig, Part};

    use super::*;

    #[test]
    fn every_key_of_every_part_is_said() {
        let text = text();
        assert!(!text.contains("{}"), "{text}");
        let joined: String = text.split_whitespace().collect();
        assert!(joined.contains(&format!("--disk{}", DiskConfig::USAGE.concat())));
        assert!(joined.contains(&format!("--net{}", NetConfig::USAGE.concat())));
    }

    #[test]
    fn no_line_of_a_usage_is_longer_than_a_terminal() {
        let text = wrapped("  --disk ", &DiskConfig::USAGE.concat());
        assert!(text.lines().count() > 1);
        assert!(text.lines().all(|line| line.len() <= WIDTH), "{text}");
    }
}
