//! Typed reading of a JSON object, field by field, so that a refusal names the field that is to blame.
//!
//! A field that is null counts as absent, as OpenAI's clients send it.

use serde_json::{Map, Value};

use crate::ApiError;

#[cfg(test)]
thread_local! {
    /// Every name that was asked for, so that a test can hold the documents against it.
    pub(crate) static ASKED: std::cell::RefCell<std::collections::BTreeSet<String>> = const { std::cell::RefCell::new(std::collections::BTreeSet::new()) };
}

/// A JSON object of a request.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fields<'a>(pub(crate) &'a Map<String, Value>);

impl<'a> Fields<'a> {
    /// The value of `name`, unless it is absent or null.
    pub(crate) fn get(self, name: &str) -> Option<&'a Value> {
        #[cfg(test)]
        ASKED.with(|asked| asked.borrow_mut().insert(name.to_owned()));
        self.0.get(name).filter(|value| !value.is_null())
    }

    /// A boolean.
    pub(crate) fn boolean(self, name: &str) -> Result<Option<bool>, ApiError> {
        self.get(name).map(|v| v.as_bool().ok_or_else(|| wrong(name, "a boolean", v))).transpose()
    }

    /// A string.
    pub(crate) fn string(self, name: &str) -> Result<Option<&'a str>, ApiError> {
        self.get(name).map(|v| v.as_str().ok_or_else(|| wrong(name, "a string", v))).transpose()
    }

    /// An object.
    pub(crate) fn object(self, name: &str) -> Result<Option<&'a Map<String, Value>>, ApiError> {
        self.get(name).map(|v| v.as_object().ok_or_else(|| wrong(name, "an object", v))).transpose()
    }

    /// A number of `low..=high`; f32's largest is no bound that is worth naming.
    pub(crate) fn number(self, name: &str, low: f64, high: f64) -> Result<Option<f32>, ApiError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let expected = || match high < f64::from(f32::MAX) {
            true => format!("a number from {low} to {high}"),
            false => format!("a number of at least {low}"),
        };
        let number =
            value.as_f64().filter(|n| n.is_finite()).ok_or_else(|| wrong(name, &expected(), value))?;
        if (low..=high).contains(&number) {
            Ok(Some(number as f32))
        } else {
            Err(wrong(name, &expected(), value))
        }
    }

    /// An integer of `low..=high`.
    pub(crate) fn integer(self, name: &str, low: i64, high: i64) -> Result<Option<i64>, ApiError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match integer(value) {
            Some(n) if (low..=high).contains(&n) => Ok(Some(n)),
            _ if high == i64::MAX => Err(wrong(name, &format!("an integer of at least {low}"), value)),
            _ => Err(wrong(name, &format!("an integer from {low} to {high}"), value)),
        }
    }

    /// Refuses `name` unless it is absent or one of `neutral`, the values that ask for nothing.
    pub(crate) fn refuse(self, name: &str, neutral: &[Value], why: &str) -> Result<(), ApiError> {
        match self.get(name) {
            Some(value) if !neutral.contains(value) => {
                Err(ApiError::unsupported(name, format!("`{name}` is not supported: {why}")))
            }
            _ => Ok(()),
        }
    }
}

/// JSON's integers, `3.0` included: some clients know only one kind of number.
pub(crate) fn integer(value: &Value) -> Option<i64> {
    let whole = |n: f64| (n.fract() == 0.0 && n.abs() < 9e15).then_some(n as i64);
    value.as_i64().or_else(|| value.as_f64().and_then(whole))
}

/// The refusal of a value that is of the wrong type or outside its range.
pub(crate) fn wrong(name: &str, expected: &str, found: &Value) -> ApiError {
    ApiError::invalid(name, format!("`{name}` must be {expected}, found {}", brief(found)))
}

/// A value as it appears in a message: short, whatever was sent.
fn brief(value: &Value) -> String {
    match value {
        Value::Array(items) => format!("a list of {}", items.len()),
        Value::Object(_) => "an object".into(),
        Value::String(text) if text.chars().count() > 40 => {
            format!("{:?}...", text.chars().take(40).collect::<String>())
        }
        other => other.to_string(),
    }
}
