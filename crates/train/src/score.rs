//! Whether an answer is right: one function per metric, of two texts.

use regex::Regex;
use serde_json::Value;

use crate::data::RowResult;

/// How an answer is compared with the one that its row gives. Space around either is no part of it.
#[derive(Debug, Clone)]
pub enum Metric {
    /// They are the same.
    Exact,
    /// The row's answer stands somewhere in the given one.
    Contains,
    /// The row's answer is a regular expression that matches somewhere in the given one.
    Regex,
    /// What the pattern finds first (its first group, or all of the match) is the same in both.
    Pattern(Regex),
    /// Both are JSON of the same value, whatever the order of keys, the spaces and the form of numbers (1 is 1.0); a
    /// fence of three backticks around an answer is none of it.
    Json,
}

impl Metric {
    /// Refuses a row's answer with which nothing can be compared.
    ///
    /// # Errors
    /// A sentence that says why.
    pub fn check(&self, reference: &str) -> RowResult<()> {
        let shown = reference.trim();
        match self {
            Self::Exact => Ok(()),
            Self::Contains if shown.is_empty() => {
                Err("the answer is empty, which every text contains".into())
            }
            Self::Contains => Ok(()),
            Self::Regex => {
                let why = |e| format!("the answer {shown:?} is no regular expression: {e}");
                Regex::new(shown).map(|_| ()).map_err(why)
            }
            Self::Pattern(pattern) => match found(pattern, reference) {
                Some(_) => Ok(()),
                None => {
                    Err(format!("the pattern {:?} finds nothing in the answer {shown:?}", pattern.as_str()))
                }
            },
            Self::Json => {
                let why = |e| format!("the answer {shown:?} is not JSON: {e}");
                serde_json::from_str::<Value>(shown).map(|_| ()).map_err(why)
            }
        }
    }

    /// Whether `answer` is right, given the row's own answer `reference`, which [`Metric::check`] has accepted.
    pub fn is_right(&self, answer: &str, reference: &str) -> bool {
        let (answer, reference) = (answer.trim(), reference.trim());
        match self {
            Self::Exact => answer == reference,
            Self::Contains => answer.contains(reference),
            Self::Regex => Regex::new(reference).is_ok_and(|pattern| pattern.is_match(answer)),
            Self::Pattern(pattern) => {
                let found = [answer, reference].map(|text| found(pattern, text));
                found[0].is_some() && found[0] == found[1]
            }
            Self::Json => {
                let [answer, reference] = [unfenced(answer), reference].map(serde_json::from_str::<Value>);
                matches!((answer, reference), (Ok(a), Ok(b)) if same(&a, &b))
            }
        }
    }
}

/// What a pattern finds first: its first group, else all of the match.
fn found<'t>(pattern: &Regex, text: &'t str) -> Option<&'t str> {
    let captures = pattern.captures(text)?;
    captures.get(1).or_else(|| captures.get(0)).map(|part| part.as_str().trim())
}

/// A text without the fence around it.
fn unfenced(text: &str) -> &str {
    let inner = text.strip_prefix("```").and_then(|rest| rest.strip_suffix("```"));
    inner.and_then(|rest| rest.split_once('\n')).map_or(text, |(_, inner)| inner)
}

fn same(a: &Value, b: &Value) -> bool {
    match (a, b) {
        // Whole numbers beyond 2^53 differ where their floats do not.
        (Value::Number(a), Value::Number(b)) if a.is_f64() || b.is_f64() => a.as_f64() == b.as_f64(),
        (Value::Array(a), Value::Array(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same(a, b)),
        (Value::Object(a), Value::Object(b)) => {
            a.len() == b.len() && a.iter().all(|(key, a)| b.get(key).is_some_and(|b| same(a, b)))
        }
        _ => a == b,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests: a panic is the report")]
mod tests {
    use super::*;

    #[test]
    fn each_metric_tells_right_from_wrong() {
        let pattern = || Metric::Pattern(Regex::new(r"#### *(-?\d+)").unwrap());
        for (metric, reference, right, wrong) in [
            (Metric::Exact, "a b", &["a b", " a b\n"][..], &["a  b", "A b", "a b c", ""][..]),
            (Metric::Contains, "7 cm", &["about 7 cm.", "7 cm"], &["7cm", ""]),
            (Metric::Regex, r"^on\b|lamp = on$", &["on it", "kitchen.lamp = on"], &["one", "lamp = on."]),
            (pattern(), "so 1+1. #### 2", &["two: ####2", "#### 2 #### 3"], &["2", "#### 22", ""]),
            (
                Metric::Json,
                r#"{"a": 1, "b": [1.5, null]}"#,
                &[r#"{"b":[1.50,null],"a":1.0}"#, "```json\n{\"a\": 1, \"b\": [1.5, null]}\n```"],
                &[r#"{"a": 1}"#, r#"{"a": 1, "b": [null, 1.5]}"#, r#"{"a": 1, "b": [1.5, null]} ok"#, "{"],
            ),
            (Metric::Json, "9007199254740993", &["9007199254740993"], &["9007199254740992"]),
        ] {
            metric.check(reference).unwrap();
            assert!(right.iter().all(|text| metric.is_right(text, reference)), "{metric:?} {right:?}");
            assert!(wrong.iter().all(|text| !metric.is_right(text, reference)), "{metric:?} {wrong:?}");
        }
        for (metric, reference) in
            [(Metric::Contains, " "), (Metric::Regex, "("), (pattern(), "2"), (Metric::Json, "{a: 1}")]
        {
            metric.check(reference).unwrap_err();
        }
    }
}
