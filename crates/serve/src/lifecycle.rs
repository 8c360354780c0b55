//! The requests that load, replace and unload adapters, in vLLM's form: `/v1/load_lora_adapter`, `/v1/unload_lora_adapter`.
//!
//! Their bodies are read strictly: a key that is not known is refused, since a misspelt `load_inplace` would mean another
//! thing. They need a key of their own, because whoever may ask a model need not be who may change it.

use std::sync::Arc;

use hyper::header::{HeaderMap, HeaderName};
use serde_json::{Map, Value, json};

use crate::auth::bearer;
use crate::fields::Fields;
use crate::loader::{Load, load};
use crate::registry::Place;
use crate::serve::State;
use crate::{ApiError, ApiKeys};

const X_ADMIN_KEY: HeaderName = HeaderName::from_static("x-admin-key");

/// A change of what is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    /// `/v1/load_lora_adapter`
    Load,
    /// `/v1/unload_lora_adapter`
    Unload,
}

/// Whether a request may change what is served: it must show the administrator's key, as `X-Admin-Key` or as a bearer.
///
/// # Errors
/// 403 where nobody may, 401 without the right key.
pub(crate) fn authorize(state: &State, headers: &HeaderMap) -> Result<(), ApiError> {
    let Some(key) = &state.registry.policy.admin_key else {
        let message =
            "Adapters cannot be changed here: the server was started without an administrator's key.";
        return Err(ApiError::request(403, "lora_updates_disabled", message));
    };
    let own = headers.get(X_ADMIN_KEY).map(|value| value.as_bytes());
    match own.or_else(|| bearer(headers)) {
        Some(shown) if ApiKeys::new([key.as_str()]).holds(shown.trim_ascii()) => Ok(()),
        _ => Err(ApiError {
            status: 401,
            kind: "authentication_error",
            message: "The administrator's key is missing or wrong.".into(),
            param: None,
            code: Some("invalid_api_key"),
        }),
    }
}

/// Does what a body asks for.
pub(crate) async fn change(
    state: &Arc<State>,
    change: Change,
    body: &Map<String, Value>,
) -> Result<Value, ApiError> {
    state.available()?;
    let known: &[&str] = match change {
        Change::Load => &["lora_name", "lora_path", "load_inplace", "expected_generation"],
        // vLLM's clients may send the number that it gave the adapter; here a name is enough.
        Change::Unload => &["lora_name", "lora_int_id"],
    };
    if let Some(unknown) = body.keys().find(|key| !known.contains(&key.as_str())) {
        let message = format!("`{unknown}` is not known here; expected {}.", known.join(", "));
        return Err(ApiError { code: Some("unknown_field"), ..ApiError::invalid(unknown, message) });
    }
    let fields = Fields(body);
    let required = |name: &str| {
        let missing = || ApiError::invalid(name, format!("`{name}` is missing; it must be a string"));
        fields.string(name)?.map(str::to_owned).ok_or_else(missing)
    };
    let name = required("lora_name")?;
    match change {
        Change::Load => {
            let path = required("lora_path")?;
            let expected = fields.string("expected_generation")?.map(str::to_owned);
            let place = match (fields.boolean("load_inplace")?.unwrap_or(false), expected) {
                (true, expected) => Place::Over(expected),
                (false, None) => Place::New,
                (false, Some(_)) => {
                    let why = "`expected_generation` needs `load_inplace`: a new name has no generation";
                    let code = Some("invalid_lora_load_policy");
                    return Err(ApiError { code, ..ApiError::invalid("expected_generation", why) });
                }
            };
            let Ok(turn) = state.registry.loading.clone().try_lock_owned() else {
                let message = "Another adapter is being loaded; try again soon.".into();
                let code = Some("lora_load_busy");
                return Err(ApiError { status: 429, kind: "rate_limit_error", message, param: None, code });
            };
            let loaded = load(state, Load { name: name.clone(), path, place }, turn).await?;
            Ok(json!({
                "message": format!("Success: LoRA adapter '{name}' added successfully."), "lora_name": name,
                "adapter_generation": loaded.generation.content(), "replaced_generation": loaded.replaced,
            }))
        }
        Change::Unload => {
            let content = state.registry.unload(&name)?;
            Ok(json!({
                "message": format!("Success: LoRA adapter '{name}' removed successfully."), "lora_name": name,
                "adapter_generation": content,
            }))
        }
    }
}
