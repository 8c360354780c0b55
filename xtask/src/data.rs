//! `cargo xtask data`: writes the rows of the demo's data set from its grammar, the same ones every time.
//!
//! The grammar (data/smart-home/grammar.txt says how to read it) pairs what people say with the command it means. No
//! command of one split occurs in another, so a score on the test rows cannot come from remembered answers.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;

use crate::sh;

/// Name and number of rows of each split, in the order in which they are drawn.
const SPLITS: [(&str, usize); 3] = [("test", 60), ("valid", 40), ("train", 400)];

pub(crate) fn task(args: &[String]) -> Result<()> {
    sh::no_arguments("data", args)?;
    for (name, text) in rows()? {
        let file = dir().join(format!("{name}.jsonl"));
        fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))?;
        eprintln!("written: {}", file.display());
    }
    Ok(())
}

/// The demo's data directory.
pub(crate) fn dir() -> PathBuf {
    sh::root().join("data/smart-home")
}

/// The text of each split's file.
fn rows() -> Result<Vec<(&'static str, String)>> {
    let file = dir().join("grammar.txt");
    let text = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
    let grammar = Grammar::parse(&text)?;
    let mut random = Random(1);
    let (mut requests, mut taken) = (HashSet::new(), HashSet::new());
    let mut splits = Vec::new();
    for (name, wanted) in SPLITS {
        let training = name == "train";
        let (mut text, mut commands) = (String::new(), HashSet::new());
        for _ in 0..wanted {
            let (request, command) = loop {
                let (request, command) = grammar.draw("row", &mut random, training)?;
                // Training rows may repeat a command in other words; held-out rows are all different.
                let fresh = !taken.contains(&command) && (training || !commands.contains(&command));
                if fresh && requests.insert(request.to_lowercase()) {
                    break (request, command);
                }
            };
            let mut letters = request.chars();
            let first = letters.next().context("an empty request")?;
            let request = format!("{}{}", first.to_uppercase(), letters.as_str());
            let row = json!({"messages": [
                {"role": "user", "content": request},
                {"role": "assistant", "content": command},
            ]});
            text += &format!("{row}\n");
            commands.insert(command);
        }
        taken.extend(commands);
        splits.push((name, text));
    }
    Ok(splits)
}

/// Lists of pairs by name.
struct Grammar(BTreeMap<String, Vec<Entry>>);

/// What is said and what it means, both with `{name}` for an entry of that list.
struct Entry {
    said: String,
    meant: String,
    /// Never in a training row.
    held_out: bool,
}

impl Grammar {
    fn parse(text: &str) -> Result<Self> {
        let mut lists: BTreeMap<String, Vec<Entry>> = BTreeMap::new();
        let mut list = String::new();
        for line in text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
            let Some((mark, entry)) = line.split_at_checked(2).filter(|(mark, _)| mark.ends_with(' ')) else {
                list = line.to_owned();
                continue;
            };
            let names: String = slots(entry).map(|slot| format!("{{{slot}}}")).collect();
            let without = if names.is_empty() { entry } else { &names };
            let (said, meant) = entry.split_once(" => ").unwrap_or((entry, without));
            let (said, meant, held_out) = (said.to_owned(), meant.to_owned(), mark.starts_with('!'));
            lists.entry(list.clone()).or_default().push(Entry { said, meant, held_out });
        }
        Ok(Self(lists))
    }

    /// A random pair of a list.
    fn draw(&self, list: &str, random: &mut Random, training: bool) -> Result<(String, String)> {
        let entries = self.0.get(list).with_context(|| format!("the grammar has no list {list}"))?;
        let allowed: Vec<&Entry> = entries.iter().filter(|entry| !(training && entry.held_out)).collect();
        ensure!(!allowed.is_empty(), "the list {list} has no entry for training rows");
        let entry = allowed[random.below(allowed.len() as u64) as usize];
        let (mut said, mut meant) = (entry.said.clone(), entry.meant.clone());
        for name in slots(&entry.said) {
            let (text, command) = self.draw(name, random, training)?;
            let slot = format!("{{{name}}}");
            said = said.replacen(&slot, &text, 1);
            meant = meant.replacen(&slot, &command, 1);
        }
        if meant.contains('{') {
            bail!("{list}: `{}` means something that it does not say", entry.said);
        }
        Ok((said, meant))
    }
}

/// The names in braces, in their order.
fn slots(text: &str) -> impl Iterator<Item = &str> {
    text.split('{').skip(1).filter_map(|rest| Some(rest.split_once('}')?.0))
}

/// Splitmix64: a few lines that give the same rows on every machine.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_committed_files_are_what_the_grammar_gives() {
        for (name, text) in rows().unwrap() {
            let file = dir().join(format!("{name}.jsonl"));
            assert!(fs::read_to_string(&file).unwrap() == text, "{}: run `cargo xtask data`", file.display());
        }
    }

    #[test]
    fn no_request_and_no_command_is_in_two_splits() {
        let mut seen = BTreeMap::new();
        for (name, text) in rows().unwrap() {
            for line in text.lines() {
                let row: serde_json::Value = serde_json::from_str(line).unwrap();
                for message in row["messages"].as_array().unwrap() {
                    let content = message["content"].as_str().unwrap().to_lowercase();
                    let other = *seen.entry(content.clone()).or_insert(name);
                    assert_eq!(other, name, "{content}");
                }
            }
        }
    }

    #[test]
    fn a_name_that_is_said_twice_means_two_things() {
        let grammar = Grammar::parse("pair\n  {a} and {a} => {a}; {a}\na\n  one => 1\n  two => 2\n").unwrap();
        let mut random = Random(0);
        for _ in 0..20 {
            let (said, meant) = grammar.draw("pair", &mut random, true).unwrap();
            let expected = said.replace("one", "1").replace("two", "2").replace(" and", ";");
            assert_eq!(meant, expected);
        }
    }
}
