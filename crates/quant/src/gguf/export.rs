//! A model directory's tensors to a GGUF file, one in memory at a time; names and metadata come from whoever knows the
//! architecture.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use super::pack::{encode, nearest_kind};
use super::{BLOCK, Block, Field, GgufWriter, Kind, Planned, in_order};
use crate::convert::{Event, read_block};
use crate::{Checkpoint, Error, Result, StoredDtype, Tensor};

/// A tensor of the checkpoint in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placed {
    /// Its name in the checkpoint.
    pub source: String,
    /// Its name in the file.
    pub name: String,
    /// Row i in the file is row `rows[i]` of the checkpoint's.
    pub rows: Option<Vec<usize>>,
}

/// All that a file shall hold.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ExportParts {
    /// The metadata; `general.file_type` and `general.quantization_version` are added here.
    pub fields: Vec<(String, Field)>,
    /// Tensors of the checkpoint.
    pub tensors: Vec<Placed>,
    /// f32 tensors that the checkpoint does not have, by their name in the file.
    pub extra: Vec<(String, Tensor)>,
}

/// What became of a matrix.
#[derive(Debug, Clone, PartialEq)]
pub struct Exported {
    /// Its name in the checkpoint.
    pub source: String,
    /// How the checkpoint stores it.
    pub from: String,
    /// How the file does.
    pub to: Kind,
    /// ||written - W|| / ||W||; 0 where every value is the same.
    pub relative_error: f64,
}

/// What was written.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ExportReport {
    /// The matrices, in the order of the file.
    pub matrices: Vec<Exported>,
    /// Bytes of the file.
    pub bytes: u64,
}

/// Writes the file at `dst`, whole or not at all. Matrices become `kind`; none keeps each in the type that holds it with
/// the least loss. Vectors are f32. `stop` is looked at between two tensors.
///
/// # Errors
/// When a tensor cannot be read or has values that its type cannot hold, when writing fails, or when `stop` was set.
pub fn export_gguf(
    checkpoint: &Checkpoint,
    parts: &ExportParts,
    dst: &Path,
    kind: Option<Kind>,
    stop: &AtomicBool,
    on_event: &mut dyn FnMut(Event),
) -> Result<ExportReport> {
    let mut plan = Vec::new();
    for placed in &parts.tensors {
        plan.push(planned(checkpoint, placed, kind, on_event)?);
    }
    let mut fields = parts.fields.clone();
    let matrices = || plan.iter().filter(|(_, shape, _)| shape.len() > 1);
    let count = |kind: Kind| matrices().filter(|planned| planned.2 == kind).count();
    let most = matrices().map(|planned| planned.2).max_by_key(|kind| (count(*kind), kind.number()));
    if let Some(kind) = most {
        fields.push(("general.file_type".into(), Field::U32(kind.file_type())));
    }
    if matrices().any(|planned| planned.2.grid().is_some()) {
        fields.push(("general.quantization_version".into(), Field::U32(2)));
    }
    let extra = |(name, tensor): &(String, Tensor)| (name.clone(), tensor.shape.clone(), Kind::F32);
    let all: Vec<Planned> = parts.extra.iter().map(extra).chain(plan.iter().cloned()).collect();
    let mut writer = GgufWriter::create(dst, &fields, &all)?;
    for (_, tensor) in &parts.extra {
        writer.add(&tensor.data)?;
    }
    let (mut report, total) = (ExportReport::default(), plan.len());
    for (done, (placed, (_, shape, kind))) in parts.tensors.iter().zip(&plan).enumerate() {
        if stop.load(Ordering::Relaxed) {
            return Err(Error::Stopped);
        }
        let block = read_block(checkpoint, &placed.source)?;
        let block = block.ok_or_else(|| missing(checkpoint, &placed.source))?;
        let error = |expected: String, found: String| Error::Tensor {
            file: checkpoint.dir().to_path_buf(),
            name: placed.source.clone(),
            expected,
            found,
        };
        let encoded = encode(&block, *kind).map_err(|cause| match cause {
            Error::Request(found) => error(format!("values that {kind} can hold"), found),
            other => other,
        })?;
        let mut data = encoded.data;
        if let Some(rows) = &placed.rows {
            let row_bytes = data.len().checked_div(shape[0]).unwrap_or(0);
            data = in_order(&data, rows, row_bytes).map_err(|(expected, found)| error(expected, found))?;
        }
        writer.add(&data)?;
        if shape.len() > 1 {
            let relative_error =
                if encoded.error > 0.0 { (encoded.error / encoded.weight).sqrt() } else { 0.0 };
            let source = placed.source.clone();
            report.matrices.push(Exported { source, from: form(&block), to: *kind, relative_error });
        }
        drop(block);
        // Buffers of the sizes just used are of no use to the next tensor.
        mlx_rs::memory::clear_cache()?;
        on_event(Event::Tensor { done: done + 1, total });
    }
    report.bytes = writer.finish()?;
    Ok(report)
}

/// Name, shape and type of a tensor in the file, from what its header and its scales say.
fn planned(
    checkpoint: &Checkpoint,
    placed: &Placed,
    kind: Option<Kind>,
    on_event: &mut dyn FnMut(Event),
) -> Result<Planned> {
    let info = checkpoint.info(&placed.source).ok_or_else(|| missing(checkpoint, &placed.source))?;
    let path = placed.source.strip_suffix(".weight").unwrap_or(&placed.source);
    let mut shape = info.shape.clone();
    if shape.len() == 1 {
        return Ok((placed.name.clone(), shape, Kind::F32));
    }
    let grid = checkpoint.grid(path)?;
    if let (Some(grid), Some(words)) = (grid, shape.last_mut()) {
        *words = grid.inputs(*words).unwrap_or(0);
    }
    let inputs = shape.last().copied().unwrap_or(0);
    let kind = match (kind, grid) {
        (Some(kind), _) if kind.grid().is_some() && !inputs.is_multiple_of(BLOCK) => {
            on_event(Event::Warning(format!(
                "{}: rows of {inputs} weights are not whole blocks of {kind}: written as F16",
                placed.source
            )));
            Kind::F16
        }
        (Some(kind), _) => kind,
        (None, Some(grid)) => {
            let read = |part: &str| checkpoint.read(&format!("{path}.{part}"));
            let biases = (!grid.is_float()).then(|| read("biases")).transpose()?;
            nearest_kind(grid, &read("scales")?, biases.as_ref())?
        }
        (None, None) => match info.dtype {
            StoredDtype::F16 => Kind::F16,
            StoredDtype::BF16 => Kind::BF16,
            _ => Kind::F32,
        },
    };
    Ok((placed.name.clone(), shape, kind))
}

fn missing(checkpoint: &Checkpoint, name: &str) -> Error {
    Error::Tensor {
        file: checkpoint.dir().to_path_buf(),
        name: name.to_owned(),
        expected: "a weight".into(),
        found: "none of that name".into(),
    }
}

/// How a tensor is stored, in words.
fn form(block: &Block) -> String {
    match block {
        Block::Packed(packed) => packed.grid.to_string(),
        Block::Dense(tensor) => format!("{:?}", tensor.dtype).to_lowercase(),
    }
}
