//! What operations that still run on rayon's threads expect here.

pub(crate) use hydralora_runtime::Early;

#[cfg(test)]
pub(crate) fn together<R>(_: Vec<()>, body: impl FnOnce() -> R) -> R {
    body()
}
