from .checking import Verdict as Verdict, check as check, hint as hint
