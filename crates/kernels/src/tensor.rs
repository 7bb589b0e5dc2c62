//! Dense row-major arrays with shared, copy-on-write storage.

use crate::buffer::Buffer;
use crate::element::{DType, Element};
#[cfg(feature = "gpu")]
use crate::gpu::DeviceBuffer;
use smallvec::SmallVec;
use std::fmt;
use std::sync::{Arc, LazyLock};

/// A dense row-major array of `f32` or `f64`.
///
/// Cloning shares the storage. The mutable accessors copy it first when it is shared, so a tensor
/// never changes under another owner.
#[derive(Clone)]
pub struct Tensor {
    storage: Storage,
    shape: Shape,
}

/// Extents, kept without an allocation: decoding makes hundreds of small tensors a token.
type Shape = SmallVec<[usize; 4]>;

#[derive(Clone)]
enum Storage {
    F32(Arc<Buffer<f32>>),
    F64(Arc<Buffer<f64>>),
    /// `f32` numbers elsewhere, fetched when they are asked for.
    #[cfg(feature = "gpu")]
    Device(DeviceBuffer),
}

/// Element types a [`Tensor`] can hold.
pub trait TensorElement: Element {
    #[doc(hidden)]
    fn wrap(buffer: Arc<Buffer<Self>>) -> TensorStorage;
    #[doc(hidden)]
    fn unwrap(tensor: &Tensor) -> &Arc<Buffer<Self>>;
    #[doc(hidden)]
    fn unwrap_mut(tensor: &mut Tensor) -> &mut Arc<Buffer<Self>>;
}

/// Storage whose variants stay private to this module.
#[doc(hidden)]
pub struct TensorStorage(Storage);

macro_rules! tensor_element {
    ($type:ty, $variant:ident $(, $fetched:pat => $fetch:expr)?) => {
        impl TensorElement for $type {
            fn wrap(buffer: Arc<Buffer<Self>>) -> TensorStorage {
                TensorStorage(Storage::$variant(buffer))
            }
            fn unwrap(tensor: &Tensor) -> &Arc<Buffer<Self>> {
                match &tensor.storage {
                    Storage::$variant(buffer) => buffer,
                    $(
                        #[cfg(feature = "gpu")]
                        $fetched => $fetch,
                    )?
                    _ => panic!("expected a {} tensor, got {}", Self::DTYPE, tensor.dtype()),
                }
            }
            fn unwrap_mut(tensor: &mut Tensor) -> &mut Arc<Buffer<Self>> {
                #[cfg(feature = "gpu")]
                tensor.return_to_host();
                let found = tensor.dtype();
                match &mut tensor.storage {
                    Storage::$variant(buffer) => buffer,
                    _ => panic!("expected a {} tensor, got {found}", Self::DTYPE),
                }
            }
        }
    };
}
tensor_element!(f32, F32, Storage::Device(buffer) => buffer.host());
tensor_element!(f64, F64);

/// Runs `$body` with `$E` bound to the element type of `$dtype`.
#[macro_export]
macro_rules! dispatch {
    ($dtype:expr, |$E:ident| $body:expr) => {
        match $dtype {
            $crate::DType::F32 => {
                type $E = f32;
                $body
            }
            $crate::DType::F64 => {
                type $E = f64;
                $body
            }
        }
    };
}

impl Tensor {
    /// Wraps `data` in row-major order.
    ///
    /// # Panics
    /// If `shape` does not have as many elements as `data`.
    pub fn new<E: TensorElement>(data: impl Into<Buffer<E>>, shape: impl AsRef<[usize]>) -> Self {
        let (data, shape) = (data.into(), Shape::from_slice(shape.as_ref()));
        assert_eq!(
            data.len(),
            shape.iter().product::<usize>(),
            "{} values given for shape {shape:?}",
            data.len()
        );
        Self { storage: E::wrap(Arc::new(data)).0, shape }
    }

    /// All zeros.
    pub fn zeros(dtype: DType, shape: impl AsRef<[usize]>) -> Self {
        let len = shape.as_ref().iter().product();
        dispatch!(dtype, |E| Self::new(Buffer::<E>::zeros(len), shape))
    }

    /// Rounds `values` to `dtype`.
    pub fn from_f64(dtype: DType, values: &[f64], shape: impl AsRef<[usize]>) -> Self {
        dispatch!(dtype, |E| {
            Self::new(values.iter().map(|&v| E::from_f64(v)).collect::<Vec<E>>(), shape)
        })
    }

    /// No numbers, shape `[0]`, without a storage of its own.
    pub fn empty(dtype: DType) -> Self {
        static EMPTY: LazyLock<[Tensor; 2]> =
            LazyLock::new(|| [DType::F32, DType::F64].map(|dtype| Tensor::zeros(dtype, [0])));
        EMPTY[usize::from(dtype == DType::F64)].clone()
    }

    /// One number, shape `[1]`.
    pub fn scalar(dtype: DType, value: f64) -> Self {
        Self::from_f64(dtype, &[value], [1])
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        match self.storage {
            Storage::F32(_) => DType::F32,
            Storage::F64(_) => DType::F64,
            #[cfg(feature = "gpu")]
            Storage::Device(_) => DType::F32,
        }
    }

    /// A tensor on a device.
    #[cfg(feature = "gpu")]
    pub(crate) fn on_device(buffer: DeviceBuffer, shape: impl AsRef<[usize]>) -> Self {
        Self { storage: Storage::Device(buffer), shape: Shape::from_slice(shape.as_ref()) }
    }

    /// Where the numbers lie, if that is on a device.
    #[cfg(feature = "gpu")]
    pub(crate) fn device_buffer(&self) -> Option<&DeviceBuffer> {
        match &self.storage {
            Storage::Device(buffer) => Some(buffer),
            _ => None,
        }
    }

    /// Fetches the numbers for good.
    #[cfg(feature = "gpu")]
    fn return_to_host(&mut self) {
        if let Storage::Device(buffer) = &self.storage {
            self.storage = Storage::F32(buffer.host().clone());
        }
    }

    /// Extents, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Product of all extents but the last.
    pub fn rows(&self) -> usize {
        let (_, outer) = self.shape.split_last().expect("a tensor has at least one dimension");
        outer.iter().product()
    }

    /// The last extent.
    pub fn cols(&self) -> usize {
        *self.shape.last().expect("a tensor has at least one dimension")
    }

    /// The elements in row-major order.
    ///
    /// # Panics
    /// If the tensor holds another element type.
    pub fn data<E: TensorElement>(&self) -> &[E] {
        E::unwrap(self)
    }

    /// The elements for writing; copied first if the storage is shared.
    pub fn data_mut<E: TensorElement>(&mut self) -> &mut [E] {
        let buffer: &mut Buffer<E> = Arc::make_mut(E::unwrap_mut(self));
        buffer
    }

    /// The same elements under another shape.
    ///
    /// # Panics
    /// If the number of elements differs.
    pub fn reshape(mut self, shape: impl AsRef<[usize]>) -> Self {
        let shape = Shape::from_slice(shape.as_ref());
        assert_eq!(self.len(), shape.iter().product::<usize>(), "{:?} to {shape:?}", self.shape);
        self.shape = shape;
        self
    }

    /// Widened (or copied) values.
    pub fn to_f64(&self) -> Vec<f64> {
        dispatch!(self.dtype(), |E| self.data::<E>().iter().map(|&v| v.to_f64()).collect())
    }

    /// Rounded (or copied) values.
    pub fn to_f32(&self) -> Vec<f32> {
        dispatch!(self.dtype(), |E| self.data::<E>().iter().map(|&v| v.to_f64() as f32).collect())
    }

    /// The same values in `dtype`; shares the storage when nothing changes.
    pub fn to_dtype(&self, dtype: DType) -> Self {
        if dtype == self.dtype() {
            return self.clone();
        }
        Self::from_f64(dtype, &self.to_f64(), self.shape())
    }

    /// The single element of a one-element tensor.
    pub fn item(&self) -> f64 {
        assert_eq!(self.len(), 1, "item() of shape {:?}", self.shape);
        self.to_f64()[0]
    }

    /// Whether every element is finite.
    pub fn is_finite(&self) -> bool {
        dispatch!(self.dtype(), |E| {
            let data = self.data::<E>();
            crate::simd::vectorize(
                #[inline(always)]
                || data.iter().fold(true, |all, &x| all & x.is_finite()),
            )
        })
    }

    /// Euclidean norm, accumulated in `f64`.
    pub fn norm(&self) -> f64 {
        dispatch!(self.dtype(), |E| {
            self.data::<E>().iter().map(|&x| x.to_f64() * x.to_f64()).sum::<f64>().sqrt()
        })
    }

    /// Adds `other` element-wise into `self`.
    ///
    /// # Panics
    /// If shapes or types differ.
    pub fn add_assign(&mut self, other: &Tensor) {
        assert_eq!(self.shape, other.shape, "adding tensors of different shapes");
        on_device!(pointwise::add_assign(self, other));
        dispatch!(self.dtype(), |E| {
            crate::simd::for_each_chunk(self.data_mut::<E>(), other.data::<E>(), |a, b| {
                for (a, &b) in a.iter_mut().zip(b) {
                    *a += b;
                }
            });
        });
    }

    /// Multiplies every element by `factor`.
    pub fn scale(&mut self, factor: f64) {
        on_device!(pointwise::scale(self, factor));
        dispatch!(self.dtype(), |E| {
            let factor = E::from_f64(factor);
            for x in self.data_mut::<E>() {
                *x *= factor;
            }
        });
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tensor({} {:?})", self.dtype(), self.shape)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writing_a_shared_tensor_leaves_the_other_owner_alone() {
        let first = Tensor::new(vec![1.0_f32, 2.0], [2]);
        let mut second = first.clone();
        second.data_mut::<f32>()[0] = 5.0;
        assert_eq!(first.to_f64(), [1.0, 2.0]);
        assert_eq!(second.to_f64(), [5.0, 2.0]);
    }

    #[test]
    #[should_panic(expected = "expected a f64 tensor, got f32")]
    fn the_wrong_element_type_is_named() {
        Tensor::zeros(DType::F32, [1]).data::<f64>();
    }
}
