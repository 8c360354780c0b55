//! From a checked request to what the engine is given: token ids, what the answer has to look like, and what its text is
//! taken apart by. Template, tokenizer and grammar can take seconds on a long text, so this runs beside the server's own
//! threads.

use graft_model::{ChatTemplate, THINKING};

use crate::engine::Info;
use crate::guide::{Guide, Guides, Wanted};
use crate::split::Shape;
use crate::tools::{CallStyle, TAG_CLOSE, ToolChoice};
use crate::{ApiError, ChatRequest, Common, Prompt};

/// What has to become token ids.
pub(crate) enum Source {
    Chat(Box<ChatRequest>),
    Prompts(Vec<Prompt>),
}

/// What the engine is given.
pub(crate) struct Ready {
    pub(crate) prompts: Vec<Vec<u32>>,
    pub(crate) guide: Option<Guide>,
    pub(crate) shape: Shape,
    /// Strings that end the answer beside the client's own.
    pub(crate) stops: Vec<String>,
}

/// Makes it.
///
/// # Errors
/// 400 naming the field: the template refuses the messages or knows no tools, a schema cannot be followed, a prompt is
/// too long.
pub(crate) fn ready(
    info: &Info,
    guides: &Guides,
    common: &Common,
    source: Source,
) -> Result<Ready, ApiError> {
    match source {
        Source::Chat(request) => chat(info, guides, &request),
        Source::Prompts(prompts) => {
            let prompts = prompts.into_iter().map(|prompt| plain(info, prompt)).collect::<Result<_, _>>()?;
            let wanted = Wanted { schema: common.schema.clone(), ..Wanted::default() };
            let guide = common.schema.as_ref().map(|_| guides.compile(info, &wanted)).transpose()?;
            Ok(Ready { prompts, guide, shape: Shape::default(), stops: Vec::new() })
        }
    }
}

fn chat(info: &Info, guides: &Guides, request: &ChatRequest) -> Result<Ready, ApiError> {
    let Some(template) = &info.template else {
        let why = "This model has no chat template; use /v1/completions.";
        return Err(ApiError::unsupported("messages", why));
    };
    let calls = style(template, request)?;
    let text = rendered(info, template, request)?;
    let ids = info.tokenizer.encode(&text, false).map_err(|_| unreadable("messages"))?;
    let prompts = vec![fitting(info, "messages", ids)?];

    let known = |mark: &str| info.tokenizer.token_to_id(mark).is_some();
    let pair = THINKING.into_iter().find(|(open, close)| known(open) && known(close));
    let ends_with = |mark: &str| text.trim_end().ends_with(mark);
    let thinks = pair.is_some_and(|(open, _)| ends_with(open));
    // Where the prompt has closed a thought already, none comes.
    let thought = pair.filter(|(_, close)| !ends_with(close));

    let forced = matches!(request.tool_choice, ToolChoice::Required | ToolChoice::Named(_));
    let schema = request.common.schema.clone().filter(|_| !forced);
    let guide = if forced || schema.is_some() {
        let named = |name: &String| match &request.tool_choice {
            ToolChoice::Named(wanted) => wanted == name,
            _ => true,
        };
        let tools = || request.tools.iter().filter(|tool| named(&tool.name)).cloned().collect();
        let marks = thought.map(|(open, close)| ((!thinks).then_some(open), close));
        let parallel = request.parallel_calls;
        let wanted = Wanted { schema, calls: calls.map(|style| (style, tools())), parallel, thought: marks };
        Some(guides.compile(info, &wanted)?)
    } else {
        None
    };
    let single = calls.is_some() && !request.parallel_calls;
    // One call is all that is wanted, so the first ends the answer where its end is a mark.
    let stops = (single && calls == Some(CallStyle::Tagged)).then(|| TAG_CLOSE.to_owned());
    let names = request.tools.iter().map(|tool| tool.name.clone()).collect();
    let shape = Shape { thought, thinks, calls, names, single, forced };
    Ok(Ready { prompts, guide, shape, stops: stops.into_iter().collect() })
}

/// How calls are written; none without tools.
fn style(template: &ChatTemplate, request: &ChatRequest) -> Result<Option<CallStyle>, ApiError> {
    if request.tools.is_empty() {
        return Ok(None);
    }
    match CallStyle::of(template.tool_source()) {
        Some(style) => Ok(Some(style)),
        None => {
            let why = "`tools` is not supported for this model: its chat template knows none, or writes their calls in \
                       a form that this server does not read";
            Err(ApiError::unsupported("tools", why))
        }
    }
}

fn rendered(info: &Info, template: &ChatTemplate, request: &ChatRequest) -> Result<String, ApiError> {
    let mut variables = info.tokenizer.template_variables();
    if let Some(effort) = &request.effort {
        let tells = |word: &str| template.tool_source().contains(word);
        if tells("reasoning_effort") {
            variables.insert("reasoning_effort".into(), effort.as_str().into());
        } else if tells("enable_thinking") {
            let thinks = !matches!(effort.as_str(), "none" | "minimal");
            variables.insert("enable_thinking".into(), thinks.into());
        } else {
            let why =
                "`reasoning_effort` is not supported for this model: its chat template knows no thoughts";
            return Err(ApiError::unsupported("reasoning_effort", why));
        }
    }
    variables.extend(request.template_args.clone());
    let sources: Vec<_> = request.tools.iter().map(|tool| tool.source.clone()).collect();
    let tools = (!sources.is_empty()).then(|| sources.into());
    template.render(&request.messages, tools.as_ref(), true, &variables).map_err(|e| {
        // Where the template's file is concerns nobody outside.
        let why = match e {
            graft_model::Error::Template { message, .. } => message,
            other => other.to_string(),
        };
        ApiError::invalid("messages", format!("The chat template refuses these messages: {why}"))
    })
}

fn plain(info: &Info, prompt: Prompt) -> Result<Vec<u32>, ApiError> {
    let ids = match prompt {
        Prompt::Text(text) => info.tokenizer.encode(&text, true).map_err(|_| unreadable("prompt"))?,
        Prompt::Ids(ids) => ids,
    };
    fitting(info, "prompt", ids)
}

fn unreadable(param: &str) -> ApiError {
    ApiError::invalid(param, format!("`{param}` cannot be split into tokens"))
}

/// Checks a prompt's tokens. One without any begins where a text begins.
fn fitting(info: &Info, param: &str, mut ids: Vec<u32>) -> Result<Vec<u32>, ApiError> {
    if ids.is_empty() {
        match info.start {
            Some(id) => ids.push(id),
            None => {
                return Err(ApiError::invalid(
                    param,
                    format!("`{param}` has no tokens; the model needs one"),
                ));
            }
        }
    }
    if ids.len() >= info.context {
        return Err(ApiError::context_length(param, ids.len(), info.context));
    }
    if let Some(id) = ids.iter().find(|id| **id as usize >= info.vocab) {
        return Err(ApiError::invalid(param, format!("`{param}` has the token {id}, which the model lacks")));
    }
    Ok(ids)
}
