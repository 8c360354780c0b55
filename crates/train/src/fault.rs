//! The usual faults of training data, each with its name, what it means and what to do.

use std::path::Path;

/// A usual fault of training data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Fault {
    /// No token of the row is a target: it is skipped.
    NothingToTrain,
    /// The row's end is cut off.
    Truncated,
    /// A text or a question without words.
    EmptyText,
    /// An answer without words.
    EmptyAnswer,
    /// The last message is not the assistant's.
    NoAnswer,
    /// Nothing after the answer ends it.
    NoEndOfTurn,
    /// Two tokens that begin a text.
    DoubleBos,
    /// Two tokens that end a text.
    DoubleEnd,
    /// Masked: the prompt alone is not what the row begins with.
    MaskShifted,
    /// Thoughts are targets.
    ThinkingTrained,
    /// The template leaves a message out.
    RoleDropped,
    /// A role that no model knows.
    UnknownRole,
    /// Content that is no text, and printed as a program prints it.
    ContentNotText,
    /// Content that holds a special token's text.
    SpecialInContent,
    /// The template leaves the tools out.
    ToolsDropped,
    /// Tools or calls that were given as a string.
    ToolsNotParsed,
    /// Tools that no answer of the file calls.
    ToolsUnused,
    /// A call of a tool that the row does not define.
    UnknownTool,
    /// The template leaves a call out.
    CallDropped,
    /// Masked: a call before the last message is no target.
    CallMasked,
    /// Characters that an earlier conversion broke.
    BrokenCharacters,
    /// A file with rows of several forms.
    MixedForms,
    /// The same row twice in a file.
    Duplicate,
    /// The same row in two files.
    InTwoSplits,
    /// Fewer rows than a batch.
    TooFewRows,
    /// No rows to validate on.
    NoValidation,
}

impl Fault {
    /// The fault's name in messages and reports.
    pub fn name(self) -> &'static str {
        self.words().0
    }

    /// Name, what is the matter with the rows ("2 of 9 rows ..."), and what to do.
    pub(crate) fn words(self) -> (&'static str, &'static str, &'static str) {
        match self {
            Self::NothingToTrain => (
                "nothing-to-train",
                "have no token to train on and are skipped",
                "the prompt fills max_seq_length, so raise that or shorten the prompt, or the row is empty",
            ),
            Self::Truncated => (
                "truncated",
                "are longer than max_seq_length and lose their end",
                "raise max_seq_length or split the rows",
            ),
            Self::EmptyText => {
                ("empty-text", "have a text or a question without words", "fill them in or drop the rows")
            }
            Self::EmptyAnswer => {
                ("empty-answer", "have an answer without words", "fill them in or drop the rows")
            }
            Self::NoAnswer => (
                "no-answer",
                "do not end with the assistant's message",
                "add the answer, or drop what follows the last one",
            ),
            Self::NoEndOfTurn => (
                "no-end-of-turn",
                "train no token that ends the answer, so the model will not learn to stop",
                "let the chat template write the end token after an answer, or name the token that it writes as \
                 eos_token_id in generation_config.json",
            ),
            Self::DoubleBos => (
                "double-bos",
                "begin with two begin tokens",
                "leave it out of the text: the tokenizer adds one of its own",
            ),
            Self::DoubleEnd => (
                "double-end",
                "end with two end tokens",
                "leave it (and what follows it) out of the text: one is added",
            ),
            Self::MaskShifted => (
                "mask-shifted",
                "do not begin with the tokens of their own prompt, so the mask ends at a wrong place",
                "look at one with graft data show; train such rows without mask_prompt, or change the template so that \
                 a prompt is rendered alike with and without its answer",
            ),
            Self::ThinkingTrained => (
                "thinking-trained",
                "train on thoughts",
                "take them out of the answers, unless the model shall learn to think so",
            ),
            Self::RoleDropped => (
                "role-dropped",
                "have messages that the chat template leaves out",
                "move their content into a message that it keeps",
            ),
            Self::UnknownRole => (
                "unknown-role",
                "have messages of a role that models do not know",
                "use system, user, assistant and tool",
            ),
            Self::ContentNotText => (
                "content-not-text",
                "have content that the template prints as a program's value",
                "write the content as one string",
            ),
            Self::SpecialInContent => (
                "special-token-in-content",
                "hold a special token's text in their content, which becomes that token",
                "take it out: the chat template writes such tokens itself",
            ),
            Self::ToolsDropped => (
                "tools-dropped",
                "define tools that the chat template leaves out",
                "describe them in the system message, or use a model whose template knows tools",
            ),
            Self::ToolsNotParsed => (
                "tools-not-parsed",
                "have a string where a list of tools or calls belongs",
                "parse the string, so that the row has the list itself",
            ),
            Self::ToolsUnused => (
                "tools-unused",
                "define tools, and no answer of the file calls one",
                "add rows with calls, or leave the tools out",
            ),
            Self::UnknownTool => (
                "unknown-tool",
                "call a tool that they do not define",
                "add it to the row's tools, or correct the name",
            ),
            Self::CallDropped => (
                "call-dropped",
                "have tool calls that the chat template leaves out",
                "write the call into the content, or use a model whose template knows calls",
            ),
            Self::CallMasked => (
                "call-masked",
                "have tool calls before the last message, which mask_prompt does not train on",
                "end a row of its own with each call, or train without mask_prompt",
            ),
            Self::BrokenCharacters => (
                "broken-characters",
                "hold characters that were broken when the text was converted",
                "make the file again from its source, read in the right encoding",
            ),
            Self::MixedForms => {
                ("mixed-forms", "have another form than most rows of the file", "write all rows in one form")
            }
            Self::Duplicate => ("duplicate", "repeat an earlier row of the file", "keep one of each"),
            Self::InTwoSplits => (
                "in-two-splits",
                "are in another split as well, so what is measured on them is memory",
                "take them out of one of the two",
            ),
            Self::TooFewRows => (
                "too-few-rows",
                "are fewer than one batch",
                "give more rows or a smaller batch_size: such a training set is refused, and a loss over so few says little",
            ),
            Self::NoValidation => (
                "no-validation",
                "",
                "no rows to validate on, so nothing shows when training begins to hurt: add valid.jsonl",
            ),
        }
    }
}

/// A fault of a file's rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Warning {
    /// What is wrong.
    pub fault: Fault,
    /// The lines of the rows it is wrong with.
    pub lines: Vec<usize>,
    /// One sentence: file, name of the fault, how many rows, which, and what to do.
    pub text: String,
}

impl Warning {
    /// The sentence without what to do, which is said to one who trains.
    pub fn finding(&self) -> &str {
        let advice = self.fault.words().2;
        self.text.strip_suffix(advice).map_or(&*self.text, |found| found.trim_end_matches(": "))
    }
}

impl Warning {
    /// `detail` is what the sentence says in brackets before the lines.
    pub(crate) fn new(fault: Fault, file: &Path, rows: usize, lines: Vec<usize>, detail: &str) -> Self {
        let (name, what, advice) = fault.words();
        let file = file.display();
        let text = if what.is_empty() {
            format!("{file}: {name}: {advice}")
        } else {
            let detail = if detail.is_empty() { String::new() } else { format!("{detail}; ") };
            let (count, named) = (lines.len(), self::lines(&lines));
            format!("{file}: {name}: {count} of {rows} rows {what} ({detail}{named}): {advice}")
        };
        Self { fault, lines, text }
    }
}

/// `line 3`, or the first few of several.
pub(crate) fn lines(all: &[usize]) -> String {
    const SHOWN: usize = 8;
    let shown: Vec<String> = all.iter().take(SHOWN).map(ToString::to_string).collect();
    let rest = all.len().saturating_sub(SHOWN);
    let more = if rest > 0 { format!(" and {rest} more") } else { String::new() };
    format!("line{} {}{more}", if all.len() == 1 { "" } else { "s" }, shown.join(", "))
}
