//! `/openapi.json`: what the interface is, for programs that make or test clients.

/// The document; a test holds it against the routes and against every field that the parsers ask for.
pub(crate) const DOCUMENT: &str = include_str!("../openapi.json");

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use graft_model::Sampling;
    use serde_json::{Map, Value};

    use super::*;
    use crate::fields::ASKED;
    use crate::http::Route;
    use crate::{ApiError, ChatRequest, CompletionRequest, Defaults, anthropic};

    fn document() -> Value {
        serde_json::from_str(DOCUMENT).unwrap()
    }

    /// Every name of a property, wherever it stands.
    fn properties(value: &Value, into: &mut BTreeSet<String>) {
        match value {
            Value::Object(map) => {
                let own = map.get("properties").and_then(Value::as_object);
                into.extend(own.into_iter().flat_map(Map::keys).cloned());
                map.values().for_each(|value| properties(value, into));
            }
            Value::Array(items) => items.iter().for_each(|item| properties(item, into)),
            _ => {}
        }
    }

    #[test]
    fn every_route_is_there_with_its_methods_and_no_other() {
        let document = document();
        let paths = document["paths"].as_object().unwrap();
        let mut seen = BTreeSet::new();
        for (path, operations) in paths {
            let route =
                Route::of(&path.replace("{model}", "m")).unwrap_or_else(|| panic!("no route for {path}"));
            let (own, methods) = route.describe();
            assert_eq!(own, path);
            for method in operations.as_object().unwrap().keys() {
                assert!(methods.split(", ").any(|m| m.eq_ignore_ascii_case(method)), "{method} {path}");
            }
            for method in methods.split(", ").filter(|m| !["HEAD", "OPTIONS"].contains(m)) {
                assert!(operations.get(method.to_lowercase()).is_some(), "{path} lacks {method}");
            }
            seen.insert(own);
        }
        for route in Route::all() {
            assert!(seen.contains(route.describe().0), "{} is not in the document", route.describe().0);
        }
    }

    #[test]
    fn every_field_that_the_parsers_ask_for_is_there_and_no_other() {
        let document = document();
        let schemas = &document["components"]["schemas"];
        let mut known = BTreeSet::new();
        properties(schemas, &mut known);
        let defaults = Defaults { max_tokens: 5, sampling: Sampling::greedy(), template_args: Map::new() };
        let corpus = include_str!("../tests/corpus/requests.jsonl");
        let bodies = || corpus.lines().map(|line| serde_json::from_str::<Map<String, Value>>(line).unwrap());
        type Parse<'a> = &'a dyn Fn(&Map<String, Value>) -> Result<(), ApiError>;
        let chat: Parse = &|body| ChatRequest::parse(body, &defaults, 300).map(drop);
        let completion: Parse = &|body| CompletionRequest::parse(body, &defaults, 300).map(drop);
        let message: Parse = &|body| anthropic::chat_request(body, false).map(drop);
        for (name, parse) in
            [("ChatRequest", chat), ("CompletionRequest", completion), ("MessagesRequest", message)]
        {
            ASKED.with(|asked| asked.borrow_mut().clear());
            bodies().for_each(|body| drop(parse(&body)));
            let asked = ASKED.with(|asked| asked.borrow().clone());
            let unknown: Vec<&String> = asked.difference(&known).collect();
            assert!(unknown.is_empty(), "{name}: the document lacks {unknown:?}");
            for field in schemas[name]["properties"].as_object().unwrap().keys() {
                let ignored = ["user", "metadata"].contains(&field.as_str());
                assert!(ignored || asked.contains(field), "{name}: nobody asks for {field}");
            }
        }
    }

    #[test]
    fn every_reference_leads_somewhere() {
        let document = document();
        let mut open = vec![&document];
        while let Some(value) = open.pop() {
            if let Some(reference) = value.get("$ref").and_then(Value::as_str) {
                assert!(document.pointer(reference.strip_prefix('#').unwrap()).is_some(), "{reference}");
            }
            match value {
                Value::Object(map) => open.extend(map.values()),
                Value::Array(items) => open.extend(items),
                _ => {}
            }
        }
    }
}
